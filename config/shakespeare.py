"""Shakespeare by the byte: nanoGPT's CPU recipe, with its shape and its number of tokens.

python train.py config/shakespeare.py

2 cores of an AMD EPYC, bfloat16, torch 2.13.0, 2026-11-26: validation loss 1.769 nats per byte in
1 min 5 s (version 0.1, in float32: 1.769 in 2 min 6 s). nanoGPT's README gives 1.88 for its own, at
a learning rate of 1e-3; with that rate this recipe came to 1.90.
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
