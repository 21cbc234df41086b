#!/usr/bin/env bash
# transformers 5.23.0: `target.generate(do_sample=True, temperature=T, assistant_model=draft)` draws the draft's tokens at the
# temperature T * T. The assistant is run with the target's prepared processors, which divide its scores by T, and with the
# target's generation config, of which its own generate() makes another division by T (AssistedCandidateGenerator in
# generation/candidate_generator.py, called by _get_candidate_generator in generation/utils.py). The text is exact, as the
# draft is verified by the probabilities that it was drawn with; only fewer of its tokens are kept, and nothing tells so.
# A model that assists itself shows it: its drafts should all be kept, and at T = 0.5 every fourth is not.
# (huggingface/transformers#40976 tells how the first division came in.)
#
# Way out: none from outside; measure acceptance at the temperature that is served, as that at 1 says little about it.
#
# Output seen:
#   temperature 1: drafts drawn at 1, of a model's own drafts 100 % kept
#   temperature 0.5: drafts drawn at 0.25, of a model's own drafts 74 % kept
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import AssistedCandidateGenerator

transformers.utils.logging.set_verbosity_error()
seen, kept, drafted = [], 0, 0


class Watched(AssistedCandidateGenerator):
    def get_candidates(self, input_ids, **others):
        global drafted
        candidates = super().get_candidates(input_ids, **others)
        drafted += candidates[0].shape[1] - input_ids.shape[1]
        if candidates[1] is not None:
            seen.append((input_ids, candidates[1][:, 0]))
        return candidates

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        global kept
        kept += int(num_matches)


transformers.generation.utils.AssistedCandidateGenerator = Watched


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


target, draft = model(), model()
draft.generation_config.update(num_assistant_tokens=1, assistant_confidence_threshold=0.0)
prompt = torch.tensor([[5, 6, 7]])
shares = {}
for temperature in (1.0, 0.5):
    seen.clear()
    kept = drafted = 0
    for seed in range(8):
        torch.manual_seed(seed)
        target.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, do_sample=True, top_k=0,
            temperature=temperature, max_new_tokens=48,
        )
    ids, scores = seen[0]
    with torch.no_grad():
        plain = draft(ids).logits[:, -1]
    drawn_at = [
        tried for tried in {temperature, temperature**2}
        if torch.allclose(scores.softmax(-1), (plain / tried).softmax(-1), atol=1e-5)
    ]
    shares[temperature] = kept / drafted
    print(f"temperature {temperature:g}: drafts drawn at {', '.join(f'{at:g}' for at in drawn_at)}, of a model's own "
          f"drafts {kept / drafted:.0%} kept".replace("%", " %"))
    if drawn_at != [temperature**2]:
        raise SystemExit("transformers behaves otherwise now")
if not (shares[1.0] > 0.98 and shares[0.5] < 0.9):
    raise SystemExit("transformers keeps another share of the drafts now")
PYTHON
