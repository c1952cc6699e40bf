"""The multiple choice for lm-eval: what its items are, and that lm-eval takes them."""

from __future__ import annotations

import collections
import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = ("river", "stone", "night", "green", "walks", "under", "seven", "bridge", "slowly", "paper")


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.lm_eval_task import __main__, items

    return __main__, items


def document(seed: int, paragraphs: int = 3) -> str:
    """Return prose of numbered words, broken into lines, under a heading and with a table."""
    draw = random.Random(seed)

    def sentence() -> str:
        words = [f"{draw.choice(WORDS)}{draw.randrange(10**6)}" for _ in range(24)]
        return " ".join(["The", *words[:12]]) + "\n   " + " ".join(words[12:]) + "."

    prose = [" ".join(sentence() for _ in range(5)) for _ in range(paragraphs)]
    return "\n\n".join(["A heading\n*********", *prose[:2], 'rule ::= "a" | "b"', *prose[2:]])


DOCUMENTS = [document(seed) for seed in range(5)]


def test_the_right_choice_follows_and_the_others_do_not(task):
    _, items = task
    made = items.make_items(DOCUMENTS, [])
    assert len(made) > 30
    for item in made:
        text = items.plain(DOCUMENTS[item["document"]])
        context = items.plain(item["context"])
        assert len(set(item["choices"])) == items.CHOICES
        for place, choice in enumerate(item["choices"]):
            assert len(choice.split()) == items.CHOSEN
            assert choice in text
            assert (f"{context} {choice}" in text) == (place == item["answer"])
            assert choice not in context
        low, high = items.CONTEXT
        assert low <= len(context.split()) <= high
        assert "::=" not in context
        assert "***" not in context


def test_items_are_the_same_each_time_and_spread(task):
    _, items = task
    made = items.make_items(DOCUMENTS, [])
    assert made == items.make_items(DOCUMENTS, [])
    rights = [item["choices"][item["answer"]] for item in made]
    assert len(set(rights)) == len(rights)
    few = items.make_items(DOCUMENTS, [], most=10)
    assert collections.Counter(item["document"] for item in few) == dict.fromkeys(range(5), 2)
    places = collections.Counter(item["answer"] for item in made)
    assert max(places.values()) - min(places[i] for i in range(items.CHOICES)) <= 1


def test_nothing_of_a_calibration_text_is_asked_for(task):
    _, items = task
    # A held-out text may quote it in other lines.
    calibration = [document(100) + "\n\n" + items.plain(DOCUMENTS[1])]
    made = items.make_items(DOCUMENTS, calibration)
    assert {item["document"] for item in made} == {0, 2, 3, 4}
    half = items.plain(DOCUMENTS[2])
    half = half[: len(half) // 2]
    made = items.make_items(DOCUMENTS, [*calibration, half])
    assert any(item["document"] == 2 for item in made)
    assert not [choice for item in made for choice in item["choices"] if choice in half]


def test_texts_without_items(task):
    _, items = task
    assert items.make_items([], []) == []
    assert items.make_items(["", "Too short.", document(0, paragraphs=0)], []) == []


def test_the_task_reads_what_the_command_writes(task):
    main, _ = task
    yaml = pytest.importorskip("yaml")
    path = ROOT / "benchmarks" / "lm_eval_task" / "continuation.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["group"] == main.GROUP
    files = {t["task"]: t["dataset_kwargs"]["data_files"]["test"] for t in config["task"]}
    assert files == {name: f"{main.FOLDER.as_posix()}/{name}.jsonl" for name in main.SOURCES}


def test_differences_are_of_the_same_items(task):
    main, _ = task
    dense = {"a": [1.0, 1.0, 0.0, 1.0], "b": [1.0]}
    same = main.difference(dense, dense)
    assert same["acc"] == {"a": 0.0, "b": 0.0, "overall": 0.0}
    assert same["acc_stderr"] == {"a": 0.0, "b": None, "overall": 0.0}
    apart = main.difference(dense, {"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0]})
    assert apart["acc"] == {"a": -0.5, "b": 0.0, "overall": -0.4}
    assert apart["acc_stderr"]["a"] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_the_page_shows_the_last_run(task, monkeypatch):
    main, _ = task
    from benchmarks.tables import __main__ as tables

    def row(run: str, model: str, value: float) -> dict:
        names = [*main.SOURCES, main.OVERALL]
        figures = {"acc": dict.fromkeys(names, value), "acc_stderr": dict.fromkeys(names, 0.0625)}
        norm = {f"acc_norm{key[3:]}": figures[key] for key in figures}
        about = {"run": run, "model": model, "width": 8, "ff_width": 9, "date": "2026-01-01"}
        about |= {"device": "a processor", "versions": {"lm-eval": "1"}, "difference": figures}
        return about | figures | norm | {"items": dict.fromkeys(names, 4)}

    table = [row("1", "old", 0.125), row("2", "dense", 0.75), row("2", "narrowed", 0.5)]
    monkeypatch.setattr(tables, "rows", lambda name: table)
    text = tables.TABLES["docs/compress.md"]["lm_eval"]()
    assert "| narrowed | 8 / 9 | 0.500 ± 0.062 |" in text
    assert "dense" in text
    assert "old" not in text
    table.clear()
    assert tables.TABLES["docs/compress.md"]["lm_eval"]() == "No rows yet."
    assert tables.since("lm_eval") == ""


def test_a_missing_lm_eval_is_named(task, monkeypatch):
    main, _ = task
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["lm_eval_task", "DENSE", "NARROW"])
    with pytest.raises(SystemExit, match=r"^needs lm-eval: pip install lm-eval$"):
        main.main()


def test_lm_eval_takes_it(task, monkeypatch, tmp_path, model_directory, one_thread, capsys):
    pytest.importorskip("lm_eval")
    main, _ = task

    def texts(folder: Path) -> tuple[list[Path], list[Path]]:
        folder.mkdir(parents=True)
        paths = [folder / f"{name}.jsonl" for name in main.SOURCES]
        for i, path in enumerate(paths):
            lines = [json.dumps({"text": document(10 * i + j)}) for j in range(2)]
            path.write_text("\n".join(lines))
        return [], paths

    monkeypatch.setattr(main, "write_texts", texts)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")  # the command sets it, and must not for others
    monkeypatch.chdir(tmp_path)
    model, out = str(model_directory), tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["x", model, model, "--limit", "3", "--out", str(out)])
    assert main.main() == 0
    assert "chance is 0.25" in capsys.readouterr().out
    dense, narrow = (json.loads(line) for line in out.read_text().splitlines())
    assert dense["items"] == {"wikipedia": 3, "news": 3, "documentation": 3, "overall": 9}
    assert dense["acc"] == narrow["acc"]
    assert narrow["difference"]["acc"]["overall"] == 0
    assert all(0 <= value <= 1 for value in dense["acc"].values())
