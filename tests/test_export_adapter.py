"""The adapter's folder: its card, and what happens when it does not belong to the base."""

import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from helpers.export import ExportError, model_card, zip_folder
from helpers.models import finished_adapter, load_adapter, load_quantized
from helpers.train import train


@pytest.fixture
def run(job, tmp_path):
    return train(**job, root=tmp_path)


def test_the_folder_holds_curve_and_tokenizer_and_gets_its_card_when_it_is_shared(run):
    names = {file.name for file in run.adapter.iterdir()}
    assert {"loss.png", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert (run.adapter / "loss.png").stat().st_size > 5000 and not list(run.folder.glob("*.part"))
    (run.adapter / "README.md").unlink(missing_ok=True)
    with zipfile.ZipFile(zip_folder(run.adapter)) as archive:
        assert archive.read("adapter/README.md").decode() == model_card(run)
    (run.adapter / "README.md").write_text("my own words")
    zip_folder(run.adapter)
    assert (run.adapter / "README.md").read_text() == "my own words"


def test_the_card_says_what_is_known_and_what_is_not(run):
    card = model_card(run)
    facts = [f"{run.best_eval_loss:.3f}", f"{run.first_eval_loss:.3f}", run.settings["data_sha256"][:16], "](loss.png)"]
    facts += ["| `learning_rate` | `0.005` |", "transformers ", "18 examples to train on, 6 held out", "**unverified**"]
    assert [fact for fact in facts if fact not in card] == []
    header = ModelCard(card).data
    assert header.base_model == Path(run.settings["model"]).name and header.library_name == "peft"
    assert header.license is None  # nothing is claimed that nobody has checked
    run.settings["data"] = "my_letters.csv"
    assert "Origin and license: **not recorded**" in model_card(run) and "CC0" not in model_card(run)
    merged = model_card(run, merged=True)
    assert "peft" not in merged.split("## Settings")[0] and "loss.png" not in merged


def test_a_license_that_the_menu_knows_reaches_the_hubs_header(run):
    run.settings["model"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = model_card(run)
    assert ModelCard(card).data.license == "apache-2.0" and "**Apache-2.0**" in card and "GGUF" in card


def test_an_adapter_of_another_base_is_refused_in_a_sentence(run, job, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job["config"].model)
    config.intermediate_size = 96
    with pytest.raises(ExportError, match=r"this base model, where .*proj is .* instead of .*: load the base it names"):
        load_adapter(run.adapter, AutoModelForCausalLM.from_config(config))
    config.intermediate_size, config.num_hidden_layers = 128, 1
    with pytest.raises(ExportError, match=r"layers\.1\..* does not exist"):
        load_adapter(run.adapter, AutoModelForCausalLM.from_config(config))


def test_reloaded_logits_are_those_of_the_model_in_memory(run, job, say):
    ids = torch.arange(5, 60)[None]
    run.model.eval()
    with torch.no_grad():
        trained = run.model(input_ids=ids).logits
        base, _ = load_quantized(job["config"], job["plan"])
        difference = (load_adapter(run.adapter, base).eval()(input_ids=ids).logits - trained).abs().max().item()
    say(f"reloaded adapter: logits differ by {difference:g} at most (1e-5 allowed)")
    assert difference <= 1e-5


def test_a_run_that_is_not_finished_has_no_finished_adapter(run):
    assert finished_adapter(run) == run.adapter
    run.finished = False
    with pytest.raises(ExportError, match="not finished"):
        finished_adapter(run)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finished_adapter("nowhere")
