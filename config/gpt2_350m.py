"""GPT-2 350M on 10B tokens.

python prepare_data.py fineweb-10b-gpt2
torchrun --standalone --nproc_per_node=8 train.py config/gpt2_350m.py

The first command downloads 20.8 GB; for your own text add --dataset=NAME to the second.
Run for 300 steps only: docs/results.md.
The learning rate is GPT-3's for this size, not tuned here.
"""

out_dir = "out/gpt2_350m"
dataset = "fineweb-10b-gpt2"
tokenizer = "gpt2"
n_layer = 24
n_head = 16
n_embd = 1024
block_size = 1024
bias = False
batch_tokens = 512 * 1024
max_steps = 19073
learning_rate = 3e-4
min_lr = 3e-4 / 10
warmup_steps = 700
