"""What every experiment needs: configuration, loaders, model and trainer, made as RecBole's run_recbole makes them."""

from __future__ import annotations

from types import SimpleNamespace

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def configure(model, settings, dataset="tiny"):
    """A Config; RecBole's SASRec takes no negatives with its default loss_type CE, ours needs one without data."""
    own = {"SASRec": {"train_neg_sample_args": None}, "SASRecCCE": {"loss_type": "CCE-"}}.get(model, {})
    config = Config(model, dataset, config_dict={**own, **settings})
    init_seed(config["seed"], config["reproducibility"])
    return config


def experiment(model, settings, dataset="tiny"):
    """config, train, valid, test (loaders), model and trainer."""
    config = configure(model, settings, dataset)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    network = get_model(model)(config, train._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    return SimpleNamespace(config=config, train=train, valid=valid, test=test, model=network, trainer=trainer)
