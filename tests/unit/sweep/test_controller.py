"""How a study begins, with MLflow replaced: what it stores, its run, studies of others; the dashboard's port."""

import socket
from types import SimpleNamespace as Namespace

import optuna
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from pipeline.config.params import Params
from pipeline.sweep import controller
from pipeline.sweep.mlflow_run import open_study_run
from pipeline.sweep.placement import Placement
from pipeline.sweep.study import open_storage
from pipeline.system.errors import InputError
from tests.studies import shared_by, sweep_config


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_status_of_a_study_can_be_shown_after_a_start_without_mlflow(project, monkeypatch, capsys):
    def fail(root):
        raise InputError("MLflow's store fails")

    monkeypatch.setattr(controller, "open_store", fail)
    sweep = sweep_config(trials=7)
    with pytest.raises(InputError, match="MLflow's store fails"):
        controller.run_study(
            Params({}), sweep, shared_by(sweep), Placement([None], 1, None), lambda study: None, lambda *_: None
        )
    controller.print_status(sweep)
    assert "0 of 7 trials started" in capsys.readouterr().out


def test_a_study_that_was_made_in_the_dashboard_is_no_study_of_a_sweep(project):
    sweep = sweep_config()
    optuna.create_study(study_name=sweep.study, storage=open_storage(sweep.storage, project, 60))
    with pytest.raises(InputError, match=r"no study s in .*: `python -m pipeline sweep` starts it"):
        controller.print_status(sweep)


@pytest.mark.parametrize(
    ("code", "is_new"),
    [("RESOURCE_DOES_NOT_EXIST", True), ("INVALID_PARAMETER_VALUE", True), ("INTERNAL_ERROR", False)],
)
def test_a_study_gets_a_second_run_only_if_its_own_is_missing(code, is_new):
    def fail(*_, **__):
        raise MlflowException("no", ErrorCode.Value(code))

    created = Namespace(info=Namespace(run_id="2"))
    client = Namespace(update_run=fail, create_run=lambda *_, **__: created, log_batch=lambda *_, **__: None)
    store = Namespace(client=client, uri="http://host", experiment_id="0")
    if is_new:
        assert open_study_run(store, "1", sweep_config(), {}) == "2"
    else:
        with pytest.raises(MlflowException):
            open_study_run(store, "1", sweep_config(), {})


def test_the_dashboard_takes_another_port_if_its_own_is_in_use(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(controller, "DASHBOARD_PORT", port := other.getsockname()[1])
        assert controller._free_port() not in (0, port)
    assert controller._free_port() == port
