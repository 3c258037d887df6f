"""The command from its arguments to its scores, against a server that answers as it is told."""

import fcntl
import json
from dataclasses import replace

import evaluate
import pytest
from arms import ArmError, Decoding, read_arms, request_body
from data_files import REPOSITORY
from openai_server import Refused, answering
from predictions import EvaluationError, Question, _prediction, read_predictions
from suites import SUITES, Row, Suite

ROWS = [Row(str(i), f"give {i}", f"prompt {i}", f"x{i}") for i in range(4)]
GAPS = [Row("0", "", "p", "x1", suffix="s")]
PROGRAMS = [Row(str(i), "", f"prompt {i}", "", program=("x = ", f"\nassert x == {i}")) for i in range(2)]


def stripped(text, row):
    return text.strip()


@pytest.fixture(autouse=True)
def small_suites(monkeypatch):
    for suite in (
        Suite("small", lambda: ROWS, 8, ("\n",), {"stripped": stripped}, frozenset({"em", "chrf"})),
        Suite("programs", lambda: PROGRAMS, 8, (), {"stripped": stripped}, frozenset({"pass"})),
    ):
        monkeypatch.setitem(SUITES, suite.name, suite)


def right(body):
    return ["x" + body["prompt"].split()[-1]]


def run(url, out, *arguments):
    evaluate.main(["small", "--url", url, "--out", str(out), *arguments])
    return json.loads((out / "scores.json").read_text())


def test_every_arm_is_asked_every_row_and_scored(tmp_path):
    with answering(lambda body: right(body) if body["model"] == "good" else ["nothing"]) as (url, asked):
        scores = run(url, tmp_path, "--arm", "a=good", "--arm", "b=bad")
    assert {(body["model"], body["prompt"]) for body in asked} == {
        (model, row.prompt) for model in ("good", "bad") for row in ROWS
    }
    assert all(body["temperature"] == 0 and body["stop"] == ["\n"] for body in asked)
    assert [(score["arm"], score["metrics"]["em@1"]) for score in scores] == [("a", 100), ("b", 0)]
    assert (scores[0]["generation"], scores[0]["prompt_tokens"], scores[0]["rows"]) == ("g1", 7, 4)
    assert scores[0]["ttft_ms"] > 0


def test_arms_take_turns_so_that_a_server_can_batch_them(tmp_path):
    with answering(right) as (url, asked):
        run(url, tmp_path, "--arm", "a=good", "--arm", "b=other", "--concurrency", "1")
    assert [body["model"] for body in asked] == ["good", "other"] * len(ROWS)


def test_a_second_run_asks_only_what_is_missing(tmp_path):
    file = tmp_path / "predictions.jsonl"
    with answering(right) as (url, asked):
        run(url, tmp_path, "--arm", "a=good", "--limit", "2")
        assert len(asked) == 2
        run(url, tmp_path, "--arm", "a=good")
        assert len(asked) == 4
        # As after a crash in the middle of a line.
        file.write_bytes(file.read_bytes()[:-10])
        run(url, tmp_path, "--arm", "a=good")
        assert len(asked) == 5
    # Nothing is missing: no server is needed.
    assert run("http://127.0.0.1:1/v1", tmp_path, "--arm", "a=good")[0]["metrics"]["em@1"] == 100
    assert len(read_predictions(file)) == 4


def test_a_run_has_one_writer(tmp_path):
    with answering(right) as (url, asked):
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(EvaluationError, match=f"another evaluation is writing to {tmp_path}"):
                run(url, tmp_path, "--arm", "a=good")
            assert asked == []
        # Whatever ends the other one lets the next begin.
        assert run(url, tmp_path, "--arm", "a=good")[0]["metrics"]["em@1"] == 100


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("predictions.jsonl", b'{"suite": "small\n', "predictions.jsonl: line 2 is damaged"),
        ("predictions.jsonl", b"\x00\x00\n", "predictions.jsonl: line 2 is damaged"),
        ("predictions.jsonl", b'{"suite": "small", "verdict": 1}\n', "predictions.jsonl is of another version"),
        ("executions.jsonl", b"\xff\n", "executions.jsonl: line 1 is damaged"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_nothing_is_lost(tmp_path, name, line, complaint):
    file = tmp_path / name
    with answering(right) as (url, _):
        run(url, tmp_path, "--arm", "a=good")
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        file.write_bytes(b"".join([*lines[:1], line, *lines[1:]]))
        damaged = file.read_bytes()
        with pytest.raises(EvaluationError, match=complaint):
            run(url, tmp_path, "--arm", "a=good")
        assert file.read_bytes() == damaged


def test_scores_outlive_a_full_disk(tmp_path, monkeypatch):
    def write_half(file, text, **_):
        file.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on the device")

    with answering(right) as (url, _):
        before = run(url, tmp_path, "--arm", "a=good")
        with monkeypatch.context() as patch:
            patch.setattr(evaluate.Path, "write_text", write_half)
            with pytest.raises(OSError, match="no space left"):
                run(url, tmp_path, "--arm", "b=good")
        assert json.loads((tmp_path / "scores.json").read_text()) == before
        assert [score["arm"] for score in run(url, tmp_path, "--arm", "b=good")] == ["a", "b"]


@pytest.mark.parametrize(("content", "text"), [(None, ""), ("", ""), ("x1", "x1")])
def test_a_chat_that_says_nothing_has_an_empty_answer(tmp_path, content, text):
    (arm,) = read_arms([], ["a=m,chat=true"])
    question = Question(SUITES["small"], ROWS[0], arm, None, Decoding())
    choices = [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]
    reply = {"model": "m", "choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 0}}
    assert _prediction(question, question.body(), reply, 1, 0.0, None, 1.0).texts == [text]


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    def choices(body):
        if body["prompt"] == ROWS[2].prompt:
            raise Refused("no")
        return right(body)

    with answering(choices) as (url, _):
        with pytest.raises(EvaluationError, match="arm a, row 2 of small: the server answers 400: .*no"):
            run(url, tmp_path, "--arm", "a=good", "--concurrency", "1")
    assert [prediction.row for prediction in read_predictions(tmp_path / "predictions.jsonl").values()] == ["0", "1"]


def test_answers_to_another_request_are_not_taken_for_this_arms(tmp_path):
    with answering(right) as (url, _):
        run(url, tmp_path, "--arm", "a=good")
        with pytest.raises(EvaluationError, match="answers to other requests"):
            run(url, tmp_path, "--arm", "a=other")


def test_a_file_of_ones_own_is_a_suite(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"give {i}", "code": f"x{i}"}) + "\n" for i in range(3)))
    with answering(lambda body: ["```\nx1\n```"]) as (url, asked):
        evaluate.main([str(file), "--url", url, "--out", str(tmp_path / "run"), "--arm", "a=good"])
    assert asked[0]["prompt"].startswith("### Instruction:\ngive ")
    (score,) = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (score["suite"], score["metrics"]["em@1"]) == ("mine", pytest.approx(100 / 3))


@pytest.mark.parametrize("reference", ["x1", "x1\n", "    x1", "\tx1\n\n", "```python\nx1\n```"])
@pytest.mark.parametrize("answer", ["x1", "x1\n", "```\nx1\n```"])
def test_a_reference_of_ones_own_is_matched_by_what_says_the_same(tmp_path, reference, answer):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"instruction": "give", "code": reference}) + "\n")
    with answering(lambda body: [answer]) as (url, _):
        evaluate.main([str(file), "--url", url, "--out", str(tmp_path / "run"), "--arm", "a=good"])
    (score,) = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert score["metrics"]["em@1"] == 100


@pytest.mark.parametrize("others", [["other/mine.jsonl"], ["small.jsonl", "small"], ["other/mine.jsonl", "small"]])
def test_suites_of_one_name_are_refused_and_none_is_left_out(tmp_path, others):
    (tmp_path / "other").mkdir()
    for name in ("mine.jsonl", "other/mine.jsonl", "small.jsonl"):
        (tmp_path / name).write_text(json.dumps({"instruction": f"give {name}", "code": "x"}) + "\n")
    files = [other if other in SUITES else str(tmp_path / other) for other in ["mine.jsonl", *others]]
    with answering(right) as (url, asked):
        with pytest.raises(EvaluationError, match="several suites are named (mine|small): "):
            evaluate.main([*files, "--url", url, "--out", str(tmp_path / "run"), "--arm", "a=good"])
        assert asked == []


def test_an_unknown_suite_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["conal", "--out", "unused", "--arm", "a=m"])
    assert "there is no suite `conal`; known are conala" in capsys.readouterr().err


def test_answers_of_several_generations_are_not_scored_as_one(tmp_path):
    with answering(right, generation="g1") as (url, _):
        run(url, tmp_path, "--arm", "a=good", "--limit", "2")
    with answering(right, generation="g2") as (url, _):
        with pytest.raises(EvaluationError, match="several generations"):
            run(url, tmp_path, "--arm", "a=good")


def test_seeds_of_several_generations_are_not_one_arm(tmp_path):
    file = tmp_path / "arms.toml"
    file.write_text('arms = [{name = "a", model = "good", seeds = [1, 2]}]')
    with answering(right, generation="g1") as (url, _):
        run(url, tmp_path, "--arms", str(file))
    predictions = (tmp_path / "predictions.jsonl").read_text().splitlines()
    of_first_seed = [line for line in predictions if json.loads(line)["seed"] == 1]
    (tmp_path / "predictions.jsonl").write_text("\n".join(of_first_seed) + "\n")
    with answering(right, generation="g2") as (url, _):
        with pytest.raises(EvaluationError, match="several generations"):
            run(url, tmp_path, "--arms", str(file))


def test_a_look_at_fewer_rows_does_not_replace_a_score(tmp_path):
    with answering(right) as (url, _):
        run(url, tmp_path, "--arm", "a=good")
        assert run(url, tmp_path, "--arm", "a=good", "--limit", "2")[0]["rows"] == len(ROWS)


def test_a_chat_writes_a_program_to_its_end_and_fills_no_gap():
    programs, gap = SUITES["programs"], Row("0", "give", "x = ", "1", suffix="\n")
    suite = replace(programs, stop=("\ndef",))
    (arm,) = read_arms([], ["a=m,chat=true"])
    assert "stop" not in request_body(suite, PROGRAMS[0], arm, None, Decoding())
    with pytest.raises(ArmError, match="a chat cannot fill a gap"):
        request_body(suite, gap, arm, None, Decoding())


def test_gaps_are_filled_by_llama_cpps_route_where_an_arm_says_so(tmp_path, monkeypatch):
    gaps = Suite("gaps", lambda: GAPS, 8, ("\n",), {"stripped": stripped}, frozenset({"em"}))
    monkeypatch.setitem(SUITES, "gaps", gaps)
    with answering(lambda body: ["x1"]) as (url, asked):
        arguments = ["gaps", "--url", url, "--out", str(tmp_path), "--arm", "a=good,infill=true", "--arm", "b=good"]
        evaluate.main(arguments)
    by_infill = {"model": "good", "n_predict": 8, "stop": ["\n"], "temperature": 0, "input_prefix": "p", "input_suffix": "s"}
    assert by_infill in asked
    assert [body for body in asked if body != by_infill] == [
        {"model": "good", "max_tokens": 8, "stop": ["\n"], "temperature": 0, "prompt": "p", "suffix": "s"}
        | {"stream": True, "stream_options": {"include_usage": True}}
    ]
    first, second = json.loads((tmp_path / "scores.json").read_text())
    assert first["metrics"] == second["metrics"] == {"em@1": 100}
    assert (first["cached_tokens"], first["ttft_ms"]) == (2, None)
    assert 0 < first["total_ms_p50"] <= first["total_ms_p90"]


@pytest.mark.parametrize(
    "percent, value", [(50, 2), (90, 4), (75, 3), (100, 4), (1, 1)]
)
def test_a_percentile_is_a_value_that_was_measured(percent, value):
    assert evaluate.percentile(percent, [4, 1, 3, 2]) == value


def test_a_seeded_arm_is_asked_with_each_of_the_papers_seeds(tmp_path):
    with answering(right) as (url, asked):
        scores = run(url, tmp_path, "--arm", "a=good,select=random,icl=store@3,seeds=paper", "--limit", "1")
    assert sorted(body["icl"]["seed"] for body in asked) == [42, 97, 777, 5432, 55555]
    assert asked[0]["icl"] | {"seed": 0} == {"store": "store", "k": 3, "select": "random", "seed": 0}
    # The server makes the prompt, of the instruction.
    assert asked[0]["prompt"] == ROWS[0].instruction
    assert {score["seed"] for score in scores} == {42, 97, 777, 5432, 55555}


def test_answers_at_an_arms_own_temperature_are_filed_as_samples(tmp_path):
    arms = ["--arm", "a=good", "--arm", "b=good,temperature=0.5", "--arm", "c=good,temperature=0"]
    with answering(lambda body: right(body) * body.get("n", 1)) as (url, asked):
        scores = run(url, tmp_path, *arms)
        assert [(score["arm"], score["decoding"]) for score in scores] == [
            ("a", "greedy"), ("b", "sample1@0.5"), ("c", "greedy"),
        ]  # fmt: skip
        assert {body["temperature"]: body.get("seed") for body in asked} == {0: None, 0.5: 42}
        assert all(body["stream"] for body in asked)
        run(url, tmp_path, *arms, "--samples", "2", "--temperature", "0.8")
    decodings = {(p.arm, p.decoding) for p in read_predictions(tmp_path / "predictions.jsonl").values()}
    assert decodings - {("a", "greedy"), ("b", "sample1@0.5"), ("c", "greedy")} == {
        ("a", "sample2@0.8"), ("b", "sample2@0.5"), ("c", "sample2@0"),
    }  # fmt: skip


def test_beams_are_not_drawn(tmp_path):
    with answering(right) as (url, asked):
        with pytest.raises(ArmError, match="arm b: beams are not drawn: leave its `temperature` out"):
            run(url, tmp_path, "--arm", "a=good", "--arm", "b=good,temperature=0.5", "--beams", "3")
        assert asked == []


def test_beams_are_scored_by_rank(tmp_path):
    with answering(lambda body: ["wrong", *right(body), "other"]) as (url, asked):
        scores = run(url, tmp_path, "--arm", "a=good", "--beams", "3")
    assert asked[0]["use_beam_search"] is True and asked[0]["n"] == 3
    assert scores[0]["metrics"] == pytest.approx({"em@1": 0, "em@2": 100, "distinct": 3, "chrf": 0}, abs=1e-9)
    assert scores[0]["ttft_ms"] is None


def refuse_beams(body):
    raise Refused("use_beam_search is unknown")


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        (refuse_beams, "answers 400: .*use_beam_search is unknown"),
        (lambda body: right(body) * body["n"], "does not know `use_beam_search`"),
        (right, "1 choices instead of 3"),
    ],
)
def test_a_server_without_beam_search_is_not_measured_as_if_it_had_it(tmp_path, choices, complaint):
    with answering(choices) as (url, _), pytest.raises(EvaluationError, match=complaint):
        run(url, tmp_path, "--arm", "a=good", "--beams", "3")


@pytest.mark.usefixtures("guards")
def test_programs_are_run_and_samples_counted(tmp_path):
    def choices(body):
        return ["0", "1", "0", "1 / 0"][: body.get("n", 1)]

    with answering(choices) as (url, _):
        evaluate.main(["programs", "--url", url, "--out", str(tmp_path), "--arm", "a=good"])
        evaluate.main(["programs", "--url", url, "--out", str(tmp_path), "--arm", "a=good", "--samples", "4"])
    greedy, sampled = json.loads((tmp_path / "scores.json").read_text())
    assert greedy["metrics"] == {"pass@1": 50}
    assert sampled["metrics"] == pytest.approx({"pass@1": (50 + 25) / 2})


def test_arms_are_read_from_files(tmp_path):
    file = tmp_path / "arms.toml"
    file.write_text(
        '[[arms]]\nname = "a"\nmodel = "m"\nstop = []\nicl = { store = "s", k = 2 }\nseeds = "paper"\n'
        '[[arms]]\nname = "b"\nmodel = "m"\nchat = true\ninstruction = "In one line: {}"\n'
    )
    first, second = read_arms([file], [])
    assert first.fields == {"model": "m", "stop": [], "icl": {"store": "s", "k": 2}}
    assert len(first.seeds) == 5
    assert second.chat and second.instruction == "In one line: {}"


def test_the_comparisons_that_come_with_the_lab_can_be_read():
    files = sorted((REPOSITORY / "lab" / "comparisons").glob("*.toml"))
    assert [len(read_arms([file], [])) >= 2 for file in files] == [True] * 8


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (["a"], "not NAME=MODEL"),
        (["a=m,icl=store"], "not icl=STORE@K"),
        (["a=m,seeds=3"], "`seeds` is `paper`"),
        (["a=m,icl=one@1,icl=two@2"], "says `icl` twice"),
        (["a=m,stop=x,stop=y"], "says `stop` twice"),
        (["a=m,model=n"], "says `model` twice"),
        (["a=m,instruction=hello"], "`instruction` must hold"),
        (["a=m,chat=yes"], "`chat` and `infill` are true or false"),
        (["a=m,infill=true,chat=true"], "`infill` has no `chat`"),
        (["a=m,n=5"], "`n` is said of all arms"),
        (["a=m,use_beam_search=true"], "`use_beam_search` is said of all arms"),
        (["a=m,temperature=warm"], "`temperature` must be a number"),
        (["a=m,temperature=true"], "`temperature` must be a number"),
        (["a=m,temperature=-1"], "`temperature` must be a number"),
        (["a=m", "a=n"], "several arms are named a"),
        ([], "at least one arm"),
    ],
)
def test_a_wrong_arm_is_refused_by_name(written, complaint):
    with pytest.raises(ArmError, match=complaint):
        read_arms([], written)
