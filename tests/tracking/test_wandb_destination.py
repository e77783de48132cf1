"""A run goes where W&B's own variables and `wandb init` say, unless the settings say otherwise, and
stays there."""

from tests.tracking.sessions import (
    RUN_ID,
    offline_records,
    steps,
    synchronize,
    train,
)

VARIABLES = {
    "WANDB_PROJECT": "papers",
    "WANDB_ENTITY": "team",
    "WANDB_NAME": "a name",
    "WANDB_RUN_GROUP": "a group",
    "WANDB_JOB_TYPE": "train",
    "WANDB_TAGS": "one,two",
    "WANDB_NOTES": "some notes",
}
DESTINATION = {
    "project": "papers",
    "entity": "team",
    "name": "a name",
    "group": "a group",
    "job_type": "train",
    "tags": ["one", "two"],
    "notes": "some notes",
}


def shown(server) -> dict:
    run = server.runs[RUN_ID]
    described = {"project": run.project, "name": run.display_name, **run.shown}
    names = {"groupName": "group", "jobType": "job_type"}
    return {names.get(key, key): value for key, value in described.items()}


def test_the_variables_of_wandb_count_in_a_session_and_in_a_later_sync_without_them(
    with_account, run_folder, server
):
    first = {**with_account, **VARIABLES}
    train(first, run_folder=run_folder, mode="offline", first_step=1, last_step=3, project="")
    done = synchronize(with_account, run_folder, project="")
    assert done["sent"] == 3
    assert shown(server) == DESTINATION
    assert synchronize({**with_account, "WANDB_PROJECT": "later"}, run_folder, project="")
    assert shown(server) == DESTINATION
    assert steps(server.runs[RUN_ID].history) == [1, 2, 3]


def test_the_settings_come_before_the_variables(with_account, run_folder, server):
    asked = {**DESTINATION, "project": "mine", "tags": ["three"], "group": ""}
    del asked["name"]
    synchronize({**with_account, **VARIABLES}, run_folder, destination=asked)
    assert shown(server) == {**DESTINATION, "project": "mine", "tags": ["three"]}


def test_the_project_of_wandb_init_counts_in_the_folder_where_it_was_chosen(
    with_account, run_folder, server, tmp_path
):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = chosen\n")
    synchronize(with_account, run_folder, cwd=tmp_path, project="")
    assert server.runs[RUN_ID].project == "chosen"


def test_a_run_belongs_to_the_project_ganscale_if_nothing_else_is_said(
    with_account, run_folder, server
):
    synchronize(with_account, run_folder, project="")
    assert shown(server)["project"] == "ganscale"
    assert shown(server)["name"] == "a run"


def test_the_clients_files_are_in_the_folder_that_wandb_dir_names(
    with_account, run_folder, server, tmp_path
):
    elsewhere = tmp_path / "large disk"
    environment = {**with_account, "WANDB_DIR": str(elsewhere)}
    train(environment, run_folder=run_folder, mode="offline", first_step=1, last_step=3)
    assert len(offline_records(elsewhere, "history")) == 3
    assert not [*run_folder.glob("wandb/offline-run-*")]
    assert synchronize(environment, run_folder)["sent"] == 3
    # `wandb sync`, out of habit, finds these marked as sent.
    assert len([*elsewhere.glob("wandb/offline-run-*/*.wandb.synced")]) == 1


def test_a_folder_that_cannot_be_made_leaves_the_files_in_the_run_folder(environment, run_folder):
    (run_folder / "file").touch()
    impossible = {**environment, "WANDB_DIR": str(run_folder / "file" / "below")}
    train(impossible, run_folder=run_folder, mode="offline", first_step=1, last_step=3)
    assert len(offline_records(run_folder, "history")) == 3


def test_the_data_of_a_run_are_its_input_in_wandb_once(with_account, run_folder, server):
    data = {"name": "digits", "fingerprint": "0123", "path": "data/digits"}
    for _ in range(2):
        synchronize(with_account, run_folder, dataset=data)
    (key,) = server.runs[RUN_ID].inputs
    assert server.artifacts[key].files == {"fingerprint.txt": b"0123\n"}
    synchronize(with_account, run_folder, dataset={**data, "fingerprint": "4567"})
    assert len(server.runs[RUN_ID].inputs) == 2


def test_variables_that_are_set_but_empty_count_as_unset(environment, run_folder):
    empty = {**environment, "WANDB_TAGS": "", "WANDB_MODE": "", "WANDB_RUN_GROUP": ""}
    train(empty, run_folder=run_folder, mode="offline", first_step=1, last_step=3)
    assert len(offline_records(run_folder, "history")) == 3


def test_a_machine_on_which_wandb_is_disabled_for_transformers_has_none(
    environment, run_folder, server
):
    disabled = {**environment, "WANDB_DISABLED": "true"}
    train(disabled, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert not [*run_folder.glob("wandb/offline-run-*")]
    assert not server.runs


def test_a_variable_that_wandb_rejects_is_named_without_its_value(environment, run_folder):
    wrong = {**environment, "WANDB_MODE": "secret"}
    outcome = train(wrong, run_folder=run_folder, mode="offline", first_step=1, last_step=3)
    assert "W&B rejects a setting from the variables WANDB_*" in outcome["output"]
    assert "mode: Input should be" in outcome["output"]
    assert "secret" not in outcome["output"]
