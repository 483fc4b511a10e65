"""The first run: a one-block GPT that learns Python from the standard library of the Python that runs it.

python train.py config/small.py
2 cores of an AMD EPYC (Zen 3), float32, torch 2.13.0, 2026-11-22: 1.587 bits per byte of Python 3.11's library, for
which lzma -9 needs 1.601 and gzip -9 1.957, in 4 min 16 s with the preparing, two evaluations and a sample.
"""

out_dir = "out/small"
dataset = "stdlib"
n_layer = 1  # in five minutes on two cores, tokens seen count for more than depth
n_head = 4
n_embd = 128
block_size = 96
batch_tokens = 16 * 96
max_steps = 2600
learning_rate = 8e-3  # small models take, and want, far higher rates than large ones
min_lr = 0.0
warmup_steps = 260
beta2 = 0.99  # a longer memory of the gradient's square steadies batches as small as these
eval_interval = 1300
log_interval = 50
sample_prompt = "def "
