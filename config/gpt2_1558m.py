"""GPT-2 1558M on 10B tokens.

torchrun --standalone --nproc_per_node=8 train.py config/gpt2_1558m.py
The data: python prepare_data.py fineweb-10b-gpt2 (20.8 GB); or add --dataset=NAME for text of yours.
Not yet run.
"""

out_dir = "out/gpt2_1558m"
dataset = "fineweb-10b-gpt2"
tokenizer = "gpt2"
n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024
bias = False
batch_tokens = 512 * 1024
max_steps = 19073
learning_rate = 2e-4
min_lr = 2e-4 / 10
warmup_steps = 700
