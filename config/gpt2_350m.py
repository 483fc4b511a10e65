"""GPT-2 350M on 10B tokens.

torchrun --standalone --nproc_per_node=8 train.py config/gpt2_350m.py
The data: python prepare_data.py fineweb-10b-gpt2 (20.8 GB); or add --dataset=NAME for text of yours.
Not yet run.
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
