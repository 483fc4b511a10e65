"""The first run: a one-block GPT that learns Python from the standard library of the Python that runs it.

python train.py config/small.py
Not yet run.
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
