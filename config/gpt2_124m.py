"""GPT-2 124M on 10B tokens.

python prepare_data.py fineweb-10b-gpt2
torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py

The first command downloads 20.8 GB; for your own text add --dataset=NAME to the second.
Not yet run to its end. One H200, torch 2.11, 2026-11-23, with --dataset=books
--batch_tokens=65536 --max_steps=300 --warmup_steps=100: 522,000 tokens/s, validation loss 5.266
nats per token on unseen books.
"""

out_dir = "out/gpt2_124m"
dataset = "fineweb-10b-gpt2"
tokenizer = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False
batch_tokens = 512 * 1024
max_steps = 19073
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 700
