"""train → eval → merge → generate on a tiny model, as one would on a large one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from peftcli import models, recipe
from peftcli.errors import ModelError
from peftcli.recipe import ModelSection
from peftcli.run import applying
from peftcli.run.subject import open_subject
from tests.conftest import Recorder
from tests.run.merging import merge_and_compare
from tests.tolerances import EXACT, LOSS

METHODS = ["lora", "dora"]
TRAINING = {"max_steps": 6, "learning_rate": 0.05, "eval_steps": 3, "save_steps": 3}
RUN_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "chat_template.jinja",
    "manifest.json",
    "metrics.jsonl",
    "adapter_seal.json",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_seal.json",
    "optimizer.safetensors",
    "state.json",
}


def evaluate(run=None, adapter=None, model=None, data=None, batch_size=None, *, force=False):
    return applying.evaluate(open_subject(run, adapter, model, force=force), data, batch_size, "cpu", Recorder())


def merge(run, target=None, dtype=None, overwrite=False, adapter=None):
    subject = open_subject(run, adapter, None)
    return merge_and_compare(subject, target or run / "merged", dtype, Recorder(), overwrite=overwrite)


def generate(run=None, prompts=("the cat ? ",), adapter=None, with_base=True, **changes):
    subject = open_subject(run, adapter, None)
    return list(applying.generate(subject, prompts, changes, "cpu", Recorder(), with_base=with_base))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(runs, recipe_file, train, tmp_path):
    """Returns a copy of a finished run of a method, trained once; the current directory is another one."""

    def folder(method):
        if not (runs / method).exists():
            path = recipe_file(method={"type": method, "r": 4, "dropout": 0.1}, training=TRAINING)
            for name in ("train.jsonl", "eval.jsonl"):
                shutil.copy(tmp_path / name, runs / f"{method}-{name}")
            data = [f"data.train={runs / method}-train.jsonl", f"data.eval={runs / method}-eval.jsonl"]
            train(path, f"output_dir={runs / method}", *data)
        else:
            recipe_file()  # for its current directory
        return shutil.copytree(runs / method, tmp_path / method)

    return folder


@pytest.mark.parametrize("method", METHODS)
def test_train_eval_merge_generate(finished, method):
    run = finished(method)
    assert {entry.name for entry in run.iterdir()} == RUN_FILES | {"checkpoint-3", "checkpoint-6", ".lock"}
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        assert {entry.name for entry in (run / checkpoint).iterdir()} == CHECKPOINT_FILES
    assert (run / "adapter_model.safetensors").stat().st_size < 60_000  # the frozen base is never written

    found = evaluate(run)
    facts = json.loads((run / "manifest.json").read_text())
    assert set(found) == {"base", "adapter"}
    assert found["adapter"]["eval_loss"] < found["base"]["eval_loss"] - 0.01
    assert found["adapter"] == pytest.approx(facts["result"]["eval"], rel=10 * LOSS)

    agreement, count = merge(run)
    assert (count, agreement.same_choice) == (14, 1.0)
    assert agreement.max_difference < EXACT[torch.float32]
    assert agreement.positions > 20
    found = evaluate(run)
    assert set(found) == {"base", "adapter", "merged"}
    assert found["merged"] == pytest.approx(found["adapter"], rel=EXACT[torch.float32])

    (answer,) = generate(run, max_new_tokens=8)
    assert set(answer) == {"prompt", "base", "adapter"}
    assert answer["base"] != answer["adapter"]
    merged = open_plain(run / "merged")
    ids = models.load_tokenizer(*merged[:2])("the cat ? ", return_tensors="pt", return_token_type_ids=False)
    output = merged[2].generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1)
    text = models.load_tokenizer(*merged[:2]).decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == answer["adapter"]


def open_plain(folder):
    """Returns section, source and model of a folder that transformers alone loads."""
    from transformers import AutoModelForCausalLM

    section = ModelSection(name=str(folder))
    return section, models.locate(section), AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", METHODS)
def test_the_runs_own_recipe_repeats_it_to_the_bit(finished, train, tmp_path, method):
    run = finished(method)
    facts = train(run / "recipe.yaml", f"output_dir={tmp_path / 'again'}")
    first, second = (folder / "adapter_model.safetensors" for folder in (run, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    assert facts["result"]["eval"] == json.loads((run / "manifest.json").read_text())["result"]["eval"]
    ours, theirs = (recipe.load(folder / "recipe.yaml").recipe for folder in (run, tmp_path / "again"))
    assert ours.model_copy(update={"output_dir": None}) == theirs.model_copy(update={"output_dir": None})


def test_the_runs_recipe_means_the_same_from_anywhere(recipe_file, train, tmp_path):
    train(recipe_file(training={"max_steps": 1}))
    written = recipe.load(tmp_path / "run" / "recipe.yaml").recipe
    assert written.data.train[0].path == str(tmp_path / "train.jsonl")
    assert written.data.eval[0].path == str(tmp_path / "eval.jsonl")
    assert written.output_dir == str(tmp_path / "run")
    assert written.data.format == "prompt-completion"  # what `auto` found


@pytest.mark.parametrize("method", METHODS)
def test_from_another_directory(finished, tmp_path, monkeypatch, method):
    run = finished(method)
    here = [evaluate(run), generate(run, max_new_tokens=5)]
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert [evaluate(run), generate(run, max_new_tokens=5)] == here
    merge(run)
    assert (run / "merged" / "config.json").is_file()


def test_the_merged_folder_is_a_plain_model(finished, model_folder):
    run = finished("lora")
    merge(run, dtype="bfloat16")
    stored = load_file(run / "merged" / "model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    assert stored.keys() == base.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((run / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    same = {name for name, tensor in base.items() if stored[name].equal(tensor.bfloat16())}
    assert same == {name for name in base if "proj.weight" not in name}
    assert {"tokenizer.json", "chat_template.jinja"} <= {entry.name for entry in (run / "merged").iterdir()}


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_peft_saved(recipe_file, model_folder, tmp_path, word_tokenizer):
    recipe_file()
    from peft import LoraConfig, get_peft_model

    plain = open_plain(model_folder)[2]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], use_dora=True)
    theirs = get_peft_model(plain, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    theirs.save_pretrained(tmp_path / "theirs")

    found = evaluate(adapter=tmp_path / "theirs", model=str(model_folder), data=tmp_path / "eval.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    summed = tokens = 0
    for row in rows:
        prompt = word_tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *word_tokenizer(row["completion"])["input_ids"], 1]])
        with torch.no_grad():
            logits = theirs(input_ids=ids).logits[0, :-1].log_softmax(-1)
        answers = logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        summed, tokens = summed - answers.sum().item(), tokens + len(answers)
    assert found["adapter"]["eval_tokens"] == tokens
    assert found["adapter"]["eval_loss"] == pytest.approx(summed / tokens, rel=10 * LOSS)
    assert abs(found["base"]["eval_loss"] - summed / tokens) > 1e-3

    target = tmp_path / "merged"
    subject = open_subject(None, tmp_path / "theirs", str(model_folder))
    agreement, count = merge_and_compare(subject, target, None, Recorder(), overwrite=False)
    assert (count, agreement.same_choice) == (4, 1.0)


def test_a_checkpoint_is_an_adapter_too(finished, model_folder):
    run = finished("dora")
    whole = evaluate(run)["adapter"]
    assert evaluate(run, adapter=run / "checkpoint-6")["adapter"] == pytest.approx(whole, rel=10 * LOSS)
    assert evaluate(run, adapter=run / "checkpoint-3")["adapter"]["eval_loss"] != whole["eval_loss"]


def test_an_adapter_whose_base_is_another_model(finished, make_model, tmp_path, word_tokenizer):
    run = finished("lora")
    make_model(hidden_size=32).save_pretrained(tmp_path / "smaller")
    word_tokenizer.save_pretrained(tmp_path / "smaller")
    with pytest.raises(ModelError, match=r"has shape \[4, 48\], not \[4, 32\]"):
        evaluate(run, model=str(tmp_path / "smaller"))


def test_a_base_with_other_weights_gives_other_results(finished, make_model, tmp_path, word_tokenizer):
    run = finished("lora")
    other = make_model(tie_word_embeddings=True)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    word_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="not those that the adapter was trained on"):
        evaluate(run, model=str(tmp_path / "other"))
    assert evaluate(run, model=str(tmp_path / "other"), force=True)["base"] != evaluate(run)["base"]
