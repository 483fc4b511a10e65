"""Qwen3's architecture with Muon, as many parameters and tokens as gpt2_124m.py.

python prepare_data.py fineweb-10b-gpt2
torchrun --standalone --nproc_per_node=8 train.py config/qwen3_124m.py

The first command downloads 20.8 GB; for your own text add --dataset=NAME to the second.
Not yet run to its end. The rates are the best of a few tried on one H200, torch 2.11, 2026-11-22,
with --dataset=books --batch_tokens=65536 --max_steps=175 --warmup_steps=20: validation loss 4.660
nats per token on unseen books. So short a run does better with another warm-up, Muon rate, momenta
and rope_theta: see docs/results.md.
"""

out_dir = "out/qwen3_124m"
dataset = "fineweb-10b-gpt2"
tokenizer = "gpt2"
arch = "qwen3"
n_layer = 12
n_head = 6  # heads of 128, as Qwen3's; twelve of 64: 4.771, not 4.715 (one seed, other rates)
n_embd = 768
block_size = 1024
batch_tokens = 512 * 1024
max_steps = 19073
optimizer = "muon"
learning_rate = 1.2e-2  # of the embeddings and vectors
muon_learning_rate = 4e-3  # of the matrices
min_lr = 0.0
warmup_steps = 700
decay = "linear"
