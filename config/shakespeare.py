"""Shakespeare by the byte: nanoGPT's CPU recipe, with the same shape and the same number of tokens.

python train.py config/shakespeare.py
Not yet run.
"""

out_dir = "out/shakespeare"
dataset = "shakespeare"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
batch_tokens = 12 * 64
micro_batch_size = 12
max_steps = 2000
learning_rate = 3e-3
min_lr = 1e-4
warmup_steps = 100
beta2 = 0.99
eval_interval = 500
eval_tokens = 200_000  # all of it
log_interval = 100
sample_prompt = "ROMEO:"
