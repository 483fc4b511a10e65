"""GPT-2 124M, fine-tuned on Shakespeare: two epochs at a small, constant rate, as nanoGPT does.

python prepare_data.py shakespeare
python prepare_data.py shakespeare_gpt2 --source=data/downloads/tinyshakespeare.txt --tokenizer=gpt2
python train.py config/finetune.py

The first command downloads the text, the second makes GPT-2's tokens of it, and the third
downloads the weights (0.5 GB; pip install safetensors huggingface_hub). Not yet run.
"""

out_dir = "out/finetune"
init_from = "gpt2"  # or gpt2-medium, gpt2-large, gpt2-xl, distilgpt2
dataset = "shakespeare_gpt2"
batch_tokens = 32 * 1024
max_steps = 20  # 2.2 epochs of 0.3M tokens
learning_rate = 3e-5  # the weights are good already; a high rate would undo them
min_lr = 3e-5
warmup_steps = 0
eval_interval = 5
eval_tokens = 100_000  # all of it
log_interval = 1
sample_prompt = "ROMEO:"
