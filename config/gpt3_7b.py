"""The GPT-3 paper's 6.7B model, in steps of 2M tokens (Brown et al. 2020, table 2.1).

python prepare_data.py fineweb-10b-gpt2
torchrun --standalone --nproc_per_node=8 train.py config/gpt3_7b.py

The first command downloads 20.8 GB; for your own text add --dataset=NAME to the second.
Run for 15 steps only: on four H200s 38,800 tokens/s, 42% of the peak. max_steps is the paper's 300B
tokens. This dataset has 10B, so it would be read 30 times: bring more text, or set --max_steps=4768
for one epoch. With AdamW weights, gradients and moments have 107 GB, split over the GPUs.
"""

out_dir = "out/gpt3_7b"
dataset = "fineweb-10b-gpt2"
tokenizer = "gpt2"
n_layer = 32
n_head = 32
n_embd = 4096
block_size = 2048
batch_tokens = 2 * 1024 * 1024
max_steps = 143051  # 300B tokens
learning_rate = 1.2e-4
min_lr = 1.2e-5
warmup_steps = 179
activation_checkpointing = "full"
parallel = "fsdp"
micro_batch_size = 4
