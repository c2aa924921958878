"""Registration: where RecBole looks models up, which defaults win, which names are refused."""

from __future__ import annotations

import pickle
import sys

import pytest
import recbole.data.dataset
import recbole.trainer
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.trainer import Trainer
from recbole.utils import InputType, get_model, get_trainer

import recbole_cce
from recbole_cce.models.sasrec import SASRecCCE, SASRecSCE
from recbole_cce.plugin import registration


@pytest.mark.parametrize("cls", [SASRecCCE, SASRecSCE])
def test_recbole_finds_the_model_its_data_set_and_its_trainer(tiny_config, cls):
    name = cls.__name__
    assert get_model(name) is cls
    assert getattr(recbole.data.dataset, f"{name}Dataset") is registration.LeanSequentialDataset
    assert get_trainer(cls.type, name) is registration.EfficientTrainer
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert cls.__module__ == "recbole_cce.models.sasrec"
    config = Config(name, "tiny", config_dict=tiny_config)
    assert config["MODEL_INPUT_TYPE"] == InputType.POINTWISE
    assert config["train_neg_sample_args"]["distribution"] == "none"


def test_defaults_of_the_two_models(tiny_config):
    assert Config("SASRecCCE", "tiny", config_dict=tiny_config)["loss_type"] == "auto"
    assert Config("SASRecSCE", "tiny", config_dict=tiny_config)["loss_type"] == "SCE"


def test_which_value_wins(tmp_path, monkeypatch):
    """RecBole < model < data set < configuration file < config_dict < command line."""
    monkeypatch.setattr(registration, "PROPERTIES", tmp_path)
    (tmp_path / "dataset").mkdir()
    model, file = tmp_path / "SASRecCCE.yaml", tmp_path / "user.yaml"
    keys = ["weight_decay", "train_batch_size", "MAX_ITEM_LIST_LENGTH", "learning_rate", "seed", "epochs"]
    for depth, path in enumerate((model, tmp_path / "dataset" / "tiny.yaml", file), 1):
        text = registration.MODELS["SASRecCCE"].read_text() if path == model else ""
        path.write_text("\n".join([text, *(f"{key}: {depth}" for key in keys[depth:])]))
    monkeypatch.setitem(registration.MODELS, "SASRecCCE", model)
    monkeypatch.setattr(sys, "argv", ["script", "--epochs=5"])
    config = Config("SASRecCCE", "tiny", [str(file)], {"gpu_id": "", "seed": 4, "epochs": 4})
    assert [config[key] for key in keys] == [0.0, 1, 2, 3, 4, 5]


def test_defaults_of_a_data_set_stay_out_of_builtin_models():
    assert registration.dataset_defaults("ml-1m") is not None
    config = Config("SASRec", "ml-1m", config_dict={"gpu_id": ""})
    ours = Config("SASRecCCE", "ml-1m", config_dict={"gpu_id": ""})
    stock = registration.read_yaml(recbole.__path__[0] + "/properties/dataset/sample.yaml")
    for key in set(registration.read_yaml(registration.dataset_defaults("ml-1m"))) & set(stock):
        assert config[key] == stock[key]
        assert ours[key] == registration.read_yaml(registration.dataset_defaults("ml-1m"))[key]


# Registering another model


def module(tmp_path, monkeypatch, name, cls):
    """The class `cls`, a SASRec with another loss, in a module that can be imported."""
    (tmp_path / f"{name}.py").write_text(
        f"from recbole_cce.models.sasrec import EfficientSASRec\n\n\nclass {cls}(EfficientSASRec):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "MODELS", dict(registration.MODELS))
    return getattr(__import__(name), cls)


def test_register_a_model(tmp_path, monkeypatch, tiny_config):
    cls = module(tmp_path, monkeypatch, "own_model", "OwnSASRec")
    defaults = tmp_path / "OwnSASRec.yaml"
    defaults.write_text(registration.MODELS["SASRecCCE"].read_text().replace("loss_type: auto", "loss_type: gBCE"))

    class OwnTrainer(registration.EfficientTrainer):
        pass

    class OwnDataset(registration.LeanSequentialDataset):
        pass

    register = recbole_cce.register_model
    assert register(cls, defaults=defaults, trainer=OwnTrainer, dataset=OwnDataset) is cls
    assert get_model("OwnSASRec") is cls
    assert get_trainer(cls.type, "OwnSASRec") is OwnTrainer
    result = run_recbole("OwnSASRec", "tiny", config_dict=tiny_config)
    assert result["test_result"]["hit@10"] > 0
    (checkpoint,) = (tmp_path / "saved").glob("OwnSASRec-*.pth")
    config, *_ = load_data_and_model(checkpoint)
    assert config["loss_type"] == "gBCE"
    assert config.model_class is cls
    with pytest.raises(ValueError, match="'OwnSASRec' is taken"):
        register(cls, defaults=defaults)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("SASRec", r"sequential_recommender/sasrec\.py"),
        ("Bpr", r"general_recommender/bpr\.py"),
        ("XGBoost", r"exlib_recommender/xgboost\.py"),
        ("SASRecCCE", r"recbole\.model\.sequential_recommender\.sasreccce"),
        ("Sequential", r"recbole\.data\.dataset\.SequentialDataset"),
        ("KG", r"recbole\.trainer\.KGTrainer"),
    ],
)
def test_names_that_recbole_has_are_refused(tmp_path, monkeypatch, name, taken):
    cls = module(tmp_path, monkeypatch, f"module_of_{name.lower()}", name)
    before = set(sys.modules), recbole.data.dataset.SequentialDataset, recbole.trainer.KGTrainer
    with pytest.raises(ValueError, match=rf"model name '{name}' is taken: .*{taken} exists; choose another"):
        recbole_cce.register_model(cls, defaults=registration.MODELS["SASRecCCE"])
    assert before == (set(sys.modules), SequentialDataset, recbole.trainer.KGTrainer)
    assert name not in set(registration.MODELS) - {"SASRecCCE"}
    assert get_trainer(cls.type, "SASRec") is Trainer


def test_a_class_that_no_other_process_could_import(monkeypatch):
    cls = type("MainSASRec", (SASRecCCE,), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="'MainSASRec' is defined in the main script: move it to a module"):
        recbole_cce.register_model(cls, defaults=registration.MODELS["SASRecCCE"])


def test_defaults_that_are_not_there(tmp_path, monkeypatch):
    cls = module(tmp_path, monkeypatch, "without_defaults", "WithoutDefaults")
    with pytest.raises(ValueError, match=r"defaults: there is no file '.*WithoutDefaults\.yaml'"):
        recbole_cce.register_model(cls)
    with pytest.raises(ValueError, match=r"defaults: there is no file 'nowhere\.yaml'"):
        recbole_cce.register_model(cls, defaults="nowhere.yaml")
    assert "WithoutDefaults" not in registration.MODELS
