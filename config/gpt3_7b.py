"""The GPT-3 paper's 6.7B model on 300B tokens (Brown et al. 2020, table 2.1).

torchrun --standalone --nproc_per_node=8 train.py config/gpt3_7b.py
Not yet run: with AdamW in fp32 it wants about 134 GB a GPU before activations, as every rank holds the whole model.
"""

out_dir = "out/gpt3_7b"
dataset = "fineweb100B"
tokenizer = "gpt2"
n_layer = 32
n_head = 32
n_embd = 4096
block_size = 2048
batch_tokens = 2 * 1024 * 1024
max_steps = 143051
learning_rate = 1.2e-4
min_lr = 1.2e-5
warmup_steps = 179
activation_checkpointing = True
