"""x"""

out_dir = "out/small"
dataset = "stdlib"
n_layer = 2
n_head = 2
n_embd = 128
block_size = 128
bias = False
batch_tokens = 1024
max_steps = 300
learning_rate = 4e-3
min_lr = 0.0
warmup_steps = 50
eval_interval = 150
eval_tokens = 65536
sample_prompt = "def "
