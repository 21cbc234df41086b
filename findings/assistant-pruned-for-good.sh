#!/usr/bin/env bash
# transformers 5.23.0: `target.generate(do_sample=True, assistant_model=draft, tokenizer=..., assistant_tokenizer=...)` rebuilds
# the model that is passed as `assistant_model`, in place and for good. Its output layer is cut to the tokens that both
# tokenizers have, and its input embeddings are wrapped by a module that maps ids, which starts in training mode. One sampled
# text later `draft(ids).logits` has other columns, though `config.vocab_size` says what it did, and `draft.generate()` fails
# on shapes. Greedy assisted generation leaves the model alone, so that a comparison of both by the same object is spoilt
# by their order. (AssistantToTargetTranslator in generation/candidate_generator.py, which generation/utils.py calls with
# assistant_prune_lm_head=True. Where config.vocab_size of both is equal, generate() refuses two tokenizers.)
#
# Way out: give generate() a copy.deepcopy of the draft.
#
# Output seen:
#   columns of the draft's logits: 44 before, 44 after a greedy text, 20 after a sampled one; config.vocab_size 44
#   modules in training mode: none before, Linear, _MapInputEmbedding, _PruneReindexingLMHead after
#   the draft's own text after: RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x96 and 32x32)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.utils.logging.set_verbosity_error()


def tokenizer(words):
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0])


def model(vocabulary, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def text(of, **options):
    return of.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, **options)[0, 3:].tolist()


def columns():
    with torch.no_grad():
        return draft(prompt).logits.shape[-1]


def training():
    return sorted({type(module).__name__ for module in draft.modules() if module.training})


prompt = torch.tensor([[3, 4, 5]])
target, draft = model(40, 0), model(44, 1)
both = {
    "assistant_model": draft,
    "tokenizer": tokenizer([f"w{number}" for number in range(40)]),
    "assistant_tokenizer": tokenizer([f"w{number}" for number in range(63, 19, -1)]),
}
before, modes_before = columns(), training()
text(draft, do_sample=False)
text(target, do_sample=False, **both)
greedy = columns()
torch.manual_seed(0)
text(target, do_sample=True, **both)
sampled = columns()
size = draft.config.vocab_size
print(f"columns of the draft's logits: {before} before, {greedy} after a greedy text, {sampled} after a sampled one; "
      f"config.vocab_size {size}")
print(f"modules in training mode: {modes_before or 'none'} before, {', '.join(training())} after")
try:
    print("the draft's own text after:", text(draft, do_sample=False))
    failed = False
except RuntimeError as error:
    print(f"the draft's own text after: RuntimeError: {error}")
    failed = True
expected = (before, greedy, sampled, size, modes_before, failed) == (44, 44, 20, 44, [], True)
if not (expected and "_PruneReindexingLMHead" in training() and "_MapInputEmbedding" in training()):
    raise SystemExit("transformers behaves otherwise now")
PYTHON
