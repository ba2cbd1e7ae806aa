"""Two generations of weights in one folder: refused, or the one that is read is named."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.opening import open_task_vectors
from trainmerge.checkpoints import open_checkpoint
from trainmerge.checkpoints.meta_model import quiet


def llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def save(model: torch.nn.Module, folder: Path, shard: str = "50GB") -> Path:
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    return folder


def test_shards_saved_into_the_folder_of_a_single_file(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    newer = save(llama(1), tmp_path / "newer", "4KB")
    for file in newer.iterdir():
        shutil.copy(file, folder)
    with pytest.raises(
        ValueError, match=r"two sets of weights, model\.safetensors and the shards of model\.s"
    ):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()  # the remedy
    assert open_checkpoint(folder).tensors.keys() == llama().state_dict().keys()


def test_an_index_without_its_shards_is_no_set_of_weights(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    shutil.copy(save(llama(), tmp_path / "old", "4KB") / "model.safetensors.index.json", folder)
    assert len(open_checkpoint(folder).files) == 1


def test_shards_of_an_older_saving_are_named(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model", "4KB")
    (folder / "model-00001-of-00099.safetensors").write_bytes(b"older")
    with pytest.warns(UserWarning, match=r"model-00001-of-00099\.safetensors is not"):
        open_checkpoint(folder)


def test_pickled_weights_in_the_folder_of_safetensors_are_named(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(folder)
    torch.save(llama(1).state_dict(), folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"model\.safetensors is read.* pytorch_model\.bin is not"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_whole_model_in_an_adapters_folder(tmp_path: Path) -> None:
    base = open_checkpoint(save(llama(), tmp_path / "base"))
    adapter = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2))
    folder = save(adapter, tmp_path / "one")
    open_task_vectors(base, {"one": folder})
    save(llama(1), folder)
    said = r"contains both an adapter \(adapter_config\.json\) and a whole model \(model\.safetensors\)"
    with pytest.raises(ValueError, match=f"one: .*{said}"):
        open_task_vectors(base, {"one": folder})
    with pytest.raises(ValueError, match=said):
        open_checkpoint(folder)
    for file in folder.glob("adapter_*"):  # the remedy, for the model
        file.unlink()
    open_task_vectors(base, {"one": folder})
