"""Trained prompts after training: what they read as, and what several of them answer together."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.checkpoint.adapter import attach
from peftcli.evaluation import generation
from peftcli.methods import prompt as prompt_method
from peftcli.ops.nearest import nearest_tokens_reference
from peftcli.recipe import GenerateSection
from peftcli.run.opening import load_weights, make_batcher
from peftcli.run.subject import evaluation_data, open_subject
from peftcli.training.objectives import label_logits
from tests.conftest import unseal
from tests.methods.building import assert_close
from tests.run.tasks import recipe_of, save_families
from tests.tolerances import EXACT, LOSS_CURVE

NUM_PROMPTS, NUM_TOKENS = 3, 3
TOLERANCE = EXACT[torch.float32]
STILL = {"max_steps": 1, "warmup_steps": 1, "save_steps": 1}
"""A training whose only step has a learning rate of 0."""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return save_families(tmp_path_factory.mktemp("families"))


def prompts_of(run):
    return load_file(Path(run) / "adapter_model.safetensors")["prompt_embeddings"]


def set_prompts(run, P):
    """Writes other prompts into a run's file."""
    path = Path(run) / "adapter_model.safetensors"
    unseal(run)
    save_file({**load_file(path), "prompt_embeddings": P.contiguous()}, path, {"format": "pt"})


def opened(run):
    """Returns a run and its adapted model."""
    subject = open_subject(Path(run), None, None)
    model, _ = load_weights(subject.base, torch.device("cpu"), subject.seed)
    attach(model, subject.adapter)
    return subject, model.eval()


# ---- readout ----


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "sequence-classification"])
def test_a_prompt_that_has_not_moved_reads_as_what_it_started_from(
    task, families, recipe_file, tmp_path, train, cli, monkeypatch
):
    chosen, original = [], prompt_method.virtual_tokens.choose

    def seen(*arguments):
        chosen.extend(original(*arguments))
        return chosen[-NUM_TOKENS:]

    monkeypatch.setattr(prompt_method.virtual_tokens, "choose", seen)
    train(recipe_file(**recipe_of("prompt", task, families, tmp_path, num_prompts=2, training=STILL)))
    started = chosen[: 2 * NUM_TOKENS]
    code, stdout, stderr = cli("readout", "run", "-k", "4", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert [(one["prompt"], one["position"]) for one in found] == [(p, i) for p in range(2) for i in range(NUM_TOKENS)]
    tokenizer = open_subject(Path("run"), None, None).base.tokenizer
    for one, ids in zip(found, started, strict=True):
        token, distance = one["nearest"][0]
        assert token == tokenizer.decode(ids)
        assert distance < TOLERANCE
        distances = [distance for _, distance in one["nearest"]]
        assert distances == sorted(distances)
        assert len(distances) == 4
        assert distances[1] > 0.1


def test_a_trained_prompt(families, recipe_file, tmp_path, train, cli):
    training = {"max_steps": 3, "learning_rate": 0.3}
    train(recipe_file(**recipe_of("prompt", "causal-lm", families, tmp_path, training=training)))
    subject, model = opened("run")
    E = model.get_input_embeddings().weight.detach()[: len(subject.base.tokenizer)]
    expected = nearest_tokens_reference(prompts_of("run"), E, 5)
    found = json.loads(cli("readout", "run", "--json")[1])
    for one, distances, ids in zip(found, *expected, strict=True):
        assert [token for token, _ in one["nearest"]] == [subject.base.tokenizer.decode([i]) for i in ids]
        assert torch.tensor([far for _, far in one["nearest"]]) == pytest.approx(distances, abs=TOLERANCE)
    code, table, _ = cli("readout", "run", "-k", "2")
    assert code == 0
    header, *rows = table.splitlines()
    assert header.split() == ["prompt", "position", "nearest", "tokens,", "cosine", "distance"]
    assert [row.split()[:2] for row in rows] == [["0", str(i)] for i in range(NUM_TOKENS)]
    (token, distance), *_ = found[0]["nearest"]
    assert f"{token!r} {distance:.3f}" in rows[0]


def test_only_tokens_that_there_are(recipe_file, train, cli, word_tokenizer):
    """The model has 128 embeddings, its tokenizer fewer tokens: the rest stand for nothing."""
    train(recipe_file(method={"type": "prompt", "num_virtual_tokens": 2}, training={"max_steps": 1}))
    (first, _) = json.loads(cli("readout", "run", "-k", "1000", "--json")[1])
    tokens = {token for token, _ in first["nearest"]}
    assert len(first["nearest"]) == len(word_tokenizer) < 128
    assert tokens == {word_tokenizer.decode([i]) for i in range(len(word_tokenizer))}


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_what_has_none_to_read(name, families, recipe_file, tmp_path, train, cli, monkeypatch):
    train(recipe_file(**recipe_of(name, "causal-lm", families, tmp_path, training={"max_steps": 1})))
    monkeypatch.setattr("peftcli.run.applying.load_weights", None)
    code, stdout, stderr = cli("readout", "run")
    assert (code, stdout, stderr.count("error:")) == (2, "", 1)
    assert f"{name} has no virtual tokens to read" in stderr
    assert "hint: readout is for type: prompt" in stderr


# ---- several prompts ----


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_prompts_side_by_side_learn_what_each_would_alone(
    task, optim, families, recipe_file, tmp_path, train, monkeypatch
):
    """Where nothing else trains (a task's head is all but still here) and no norm over all of them is clipped."""
    training = {
        "max_steps": 4,
        "learning_rate": 0.05,
        **({} if task == "causal-lm" else {"head_learning_rate": 1e-30}),
        "optim": optim,
        "max_grad_norm": None,
        "weight_decay": 0.0,
        "per_device_train_batch_size": 4,
    }
    start = 0.3 * torch.randn(NUM_PROMPTS * NUM_TOKENS, 48)
    model = {"name": str(families["llama"])}  # not BERT, whose new pooler would train too

    def trained(P, name):
        monkeypatch.setattr(prompt_method, "initial_prompts", lambda *_: P.clone())
        sections = recipe_of(
            "prompt", task, families, tmp_path, num_prompts=len(P) // NUM_TOKENS, training=training, model=model
        )
        train(recipe_file(**sections, output_dir=name))
        return prompts_of(name)

    together = trained(start, "together").split(NUM_TOKENS)
    for number, P in enumerate(start.split(NUM_TOKENS)):
        alone = trained(P, f"alone-{number}")
        assert_close(together[number] - P, alone - P, LOSS_CURVE)
        assert float((alone - P).abs().max()) > (1e-2 if optim == "adamw" else 1e-5)


def votes(model, subject, samples):
    """Returns the label [prompts, samples] that each prompt alone gives each sample, and how surely [.., labels]."""
    found = []
    for ids in subject.prompts:
        batch = make_batcher(samples, subject.base, joins=False, prompts=[ids]).batch(range(len(samples)))
        with torch.no_grad():
            found.append(label_logits(model, batch).log_softmax(-1))
    return torch.stack(found)


def test_labels_are_voted_on(families, recipe_file, tmp_path, train, cli):
    sections = recipe_of("prompt", "sequence-classification", families, tmp_path, num_prompts=3, training=STILL)
    train(recipe_file(**sections))
    torch.manual_seed(5)
    set_prompts("run", 6 * torch.randn(NUM_PROMPTS * NUM_TOKENS, 32))
    subject, model = opened("run")
    with torch.no_grad():
        model.classifier.weight.copy_(torch.randn(2, 32))  # so that prompts disagree
    path = Path("run/adapter_model.safetensors")
    tensors = load_file(path)
    (key,) = (key for key in tensors if key.endswith("classifier.weight"))
    save_file({**tensors, key: model.classifier.weight.detach()}, path, {"format": "pt"})
    samples = evaluation_data(subject, None)
    scores = votes(model, subject, samples)
    own = scores.argmax(-1)
    assert (own != own[0]).any(), "the prompts agree on all, and so would any rule"
    truth = [int(samples[i].target[0]) for i in range(len(samples))]
    chosen = [Counter(column.tolist()).most_common(1)[0][0] for column in own.T]  # of three, two agree
    accuracy = sum(a == b for a, b in zip(chosen, truth, strict=True)) / len(truth)
    code, stdout, stderr = cli("eval", "run", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)["adapter"]
    assert found["eval_accuracy"] == pytest.approx(accuracy)
    assert found["eval_samples"] == len(truth)
    loss = -scores[:, range(len(truth)), truth].mean()
    assert found["eval_loss"] == pytest.approx(float(loss), rel=TOLERANCE)
    for size in ("1", "3"):
        again = json.loads(cli("eval", "run", "--batch-size", size, "--json")[1])["adapter"]
        assert again == pytest.approx(found, rel=TOLERANCE)


@pytest.fixture
def writers(families, recipe_file, tmp_path, train):
    """Trains three prompts of a language model; returns a function that gives each other tensors, and the run."""
    sections = recipe_of("prompt", "causal-lm", families, tmp_path, num_prompts=3, training=STILL)
    train(recipe_file(**sections))

    def write(*prompts):
        set_prompts("run", torch.cat(prompts))
        return opened("run")

    return write


def answer(subject, model, prompts, length=6):
    settings = GenerateSection(max_new_tokens=length)
    return generation.generate(model, subject.base.tokenizer, "the cat", "text", settings, 0, prompts)


def test_texts_are_voted_on(writers, cli):
    torch.manual_seed(2)
    one, other = 3 * torch.randn(2, NUM_TOKENS, 48)
    for order in ([one, one, other], [other, one, one], [one, other, one]):
        subject, model = writers(*order)
        alone = [answer(subject, model, [ids]) for ids in subject.prompts]
        wanted = Counter(alone).most_common(1)[0]
        assert wanted[1] == 2, "the two prompts write the same"
        assert answer(subject, model, subject.prompts) == wanted[0]
    said = [cli("generate", "run", "the cat", "--max-new-tokens", "6", "--json")[1] for _ in range(2)]
    assert said[0] == said[1]
    assert json.loads(said[0])[0]["adapter"] == wanted[0]


@torch.no_grad()
def test_an_answers_score_is_of_what_was_written_and_not_of_its_padding(writers, monkeypatch):
    """Answers end at different lengths; each prompt alone, where nothing is padded, is the truth."""
    torch.manual_seed(4)
    subject, model = writers(*(3 * torch.randn(3, NUM_TOKENS, 48)))
    ends = list(range(2, 128, 3))
    model.generation_config.eos_token_id = ends
    tokenizer, scores, lengths = subject.base.tokenizer, [], []
    own = tokenizer("the cat")["input_ids"]
    for virtual in subject.prompts:
        ids, scored = [*virtual, *own], []
        while len(scored) < 12 and not (scored and ids[-1] in {*ends, tokenizer.eos_token_id}):
            steps = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            scored.append(float(steps.max()))
            ids.append(int(steps.argmax()))
        scores.append(sum(scored) / len(scored))
        lengths.append(len(scored))
    assert len(set(lengths)) > 1, "all answers are of one length"
    taken = []
    monkeypatch.setattr(generation, "majority_answer", lambda answers, given: taken.extend(given) or answers[0])
    answer(subject, model, subject.prompts, length=12)
    assert taken == pytest.approx(scores, rel=TOLERANCE)
