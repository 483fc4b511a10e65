"""The first run: a two-block Qwen3 that learns Python from the standard library of the Python that runs it.

python train.py config/small.py
2 cores of an AMD EPYC (Zen 3), float32, torch 2.13.0, 2026-11-22: NOT MEASURED
"""

out_dir = "out/small"
dataset = "stdlib"
arch = "qwen3"
n_layer = 2
n_head = 4
n_embd = 128
block_size = 96
tie_embeddings = False
batch_tokens = 32 * 96
max_steps = 1100
optimizer = "muon"
learning_rate = 1.6e-2  # small models take, and want, far higher rates than large ones
muon_learning_rate = 8e-3
min_lr = 0.0
warmup_steps = 110
beta2 = 0.99  # a longer memory of the gradient's square steadies batches as small as these
eval_interval = 1100
log_interval = 20
sample_prompt = "def "
