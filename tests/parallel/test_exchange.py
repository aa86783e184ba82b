"""What several processes tell each other: objects of any size, and examples that each tokenizes."""

import json
from pathlib import Path

import pytest

from tests.parallel.launch import finish, launch
from tests.tiny import write_checkpoint

EXCHANGE = """
import json, sys
import jax
from transformers import AutoTokenizer
from qlora_jax import QloraError
from qlora_jax.data import rows_to_examples, rows_to_pairs, tokenize, tokenize_pairs
from qlora_jax.parallel import exchange, join

join()
count, number = jax.process_count(), jax.process_index()

exchange.AT_ONCE = 100 * count  # so that most objects below take several exchanges
sent = [list(range(10**n)) for n in range(count)]
assert exchange.gather(sent[number]) == sent
assert exchange.gather({number}) == [{n} for n in range(count)]

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
seen = []

class Counting:
    def __getattr__(self, name):
        return getattr(tokenizer, name)

    def __call__(self, text, **options):
        seen.append(text)
        return tokenizer(text, **options)

def same(shared, alone):
    places = [x.where for x in shared]
    assert places == [x.where for x in alone] and (shared.cut, shared.dropped) == (2, 3), shared
    assert (alone.cut, alone.dropped) == (2, 3), alone
    for one, other in zip(shared, alone):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()

# The first process's part has nothing that can be learned, the last one's is the only one cut.
rows = [{"input": f"say {i}", "output": "" if i < 3 else f"{i}"} for i in range(9)]
rows[7]["output"] = rows[8]["output"] = "0 and 1 and 2 and 3 and 4"
pairs = rows_to_pairs(rows, "input-output")
shared = tokenize_pairs(pairs, Counting(), target_max_length=6, share=True)
same(shared, tokenize_pairs(pairs, tokenizer, target_max_length=6))

def fails(rows):
    try:
        tokenize(rows_to_examples(rows), tokenizer, 64, "plain", share=True)
    except QloraError as error:
        return str(error)

# Two turns of an assistant cannot be told apart without a template: the second process's row.
turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
good = {"prompt": "p", "completion": "c"}
bad = fails([good, good, {"messages": turns}, good, {"messages": turns}])
print(json.dumps([seen, bad, fails([good])]))
"""


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    said = finish(launch(["-c", EXCHANGE, str(folder)], 3))
    answers = [json.loads(text.splitlines()[-1]) for text in said]
    for number, (seen, bad, nothing_bad) in enumerate(answers):
        sources = [text for text in seen if text.startswith("say")]
        assert sources == [f"say {i}" for i in range(3 * number, 3 * number + 3)]
        assert bad.startswith("rows, row 2: a conversation of several answers"), bad
        assert nothing_bad is None
