import json

import pytest

from benchmarks.ranks import run_ranks
from ganscale.evaluation.work_share import WorkShare
from tests.evaluation import quality_ranks as ranks


@pytest.fixture(scope="module")
def alone():
    return ranks.all_figures(WorkShare(), batch=250)


@pytest.mark.parametrize("world_size", [2, 4])
def test_figures_of_several_ranks_are_those_of_one(tmp_path, alone, world_size):
    """Real gloo processes, with another batch size than the single rank's, too."""
    run_ranks("tests.evaluation.quality_ranks:run", tmp_path, world_size, seconds=600)
    figures = [
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world_size)
    ]
    assert all(others == figures[0] for others in figures[1:])
    for name, expected in alone.items():
        assert figures[0][name] == pytest.approx(expected, rel=1e-9), name
