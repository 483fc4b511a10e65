"""Shakespeare by the byte, in the size of nanoGPT's CPU recipe and with as many tokens.

python train.py config/shakespeare.py

2 cores of an AMD EPYC, bfloat16, torch 2.13.0, 2026-11-26: validation loss 1.538, 1.540 and 1.550
nats per byte with seeds 1, 2 and 3, each in less than a minute. GPT-2 with AdamW needs as long for
1.770, and nanoGPT's README gives 1.88 for its own: docs/results.md.
"""

out_dir = "out/shakespeare"
dataset = "shakespeare"
arch = "qwen3"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
tie_embeddings = False  # costs no time here: 1.536, tied 1.554 (one seed)
batch_tokens = 64 * 64  # so that Muon's updates take little of the time
micro_batch_size = 64
max_steps = 375
optimizer = "muon"
learning_rate = 1.2e-2
embedding_learning_rate = 4.8e-2
muon_momentum = 0.85
min_lr = 0.0
warmup_steps = 38
decay = "linear"
beta2 = 0.99
eval_interval = 125
eval_tokens = 200_000  # all of it
log_interval = 25
sample_prompt = "ROMEO:"
