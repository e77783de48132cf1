import numpy as np
import pytest
import torch

from ganscale.errors import UserError
from ganscale.evaluation.quality.frechet import GaussianStatistics
from ganscale.evaluation.quality.statistics_files import load_statistics, save_statistics

MEAN = np.array([0.5, -1.0, 2.0])
COVARIANCE = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.25], [0.0, -0.25, 3.0]])


def test_saved_statistics_are_loaded_bit_by_bit(tmp_path):
    path = tmp_path / "statistics.npz"
    saved = GaussianStatistics(torch.from_numpy(MEAN), torch.from_numpy(COVARIANCE) / 3, 70_000)
    save_statistics(path, saved)
    loaded = load_statistics(path, 3)
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.covariance, saved.covariance)
    assert loaded.count == 70_000
    with np.load(path) as file:  # as pytorch-fid reads it
        np.testing.assert_array_equal(file["mu"], MEAN)


def test_files_of_adm_and_in_float32_are_loaded(tmp_path):
    path = tmp_path / "statistics.npz"
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images, mu=MEAN, sigma=COVARIANCE, mu_s=MEAN[:2], sigma_s=MEAN)
    assert torch.equal(load_statistics(path, 3).covariance, torch.from_numpy(COVARIANCE))
    assert load_statistics(path, 3).count is None
    np.savez(path, mu=MEAN.astype(np.float32), sigma=(COVARIANCE / 3).astype(np.float32))
    loaded = load_statistics(path, 3)
    assert loaded.covariance.dtype == torch.float64
    torch.testing.assert_close(
        loaded.covariance, torch.from_numpy(COVARIANCE / 3), rtol=1e-6, atol=0
    )


def nan(array):
    return np.where(np.arange(array.size).reshape(array.shape) == 1, np.nan, array)


def lopsided(array):
    return array + np.triu(np.full_like(array, 0.1), 1)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mu": MEAN}, "have no sigma"),
        ({"arr_0": MEAN}, "have no mu and no sigma"),
        ({"mu": MEAN[:2], "sigma": COVARIANCE[:2, :2]}, "the feature network has 3 features"),
        ({"mu": MEAN, "sigma": COVARIANCE[0]}, "the feature network has 3 features"),
        ({"mu": nan(MEAN), "sigma": COVARIANCE}, "mu of the statistics .* is NaN or infinite"),
        ({"mu": MEAN, "sigma": nan(COVARIANCE)}, "sigma of the statistics .* is NaN or infinite"),
        ({"mu": MEAN, "sigma": lopsided(COVARIANCE)}, "not symmetric"),
        ({"mu": MEAN, "sigma": -COVARIANCE}, "not a covariance"),
        ({"mu": MEAN.astype(str), "sigma": COVARIANCE}, "of type <U"),
        ({"mu": MEAN, "sigma": COVARIANCE, "num_images": 1}, "of 1 images"),
        ({"mu": MEAN, "sigma": COVARIANCE, "num_images": MEAN}, "num_images .* has the shape"),
        ({"mu": MEAN.astype(object), "sigma": COVARIANCE}, "not an npz file of plain arrays"),
    ],
)
def test_arrays_that_are_no_statistics_are_a_users_error(tmp_path, arrays, sentence):
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=sentence):
        load_statistics(path, 3)


def test_a_damaged_file_is_a_users_error(tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez_compressed(path, mu=MEAN, sigma=COVARIANCE)
    content = path.read_bytes()
    for end in (0, 3, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="not an npz file"):
            load_statistics(path, 3)
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
        try:
            load_statistics(path, 3)
        except UserError:
            continue


def test_files_that_are_no_npz_are_a_users_error(tmp_path):
    np.save(tmp_path / "array.npy", MEAN)
    (tmp_path / "text.npz").write_text("mu sigma")
    for name, sentence in [
        ("array.npy", "not an npz file"),
        ("text.npz", "not an npz file"),
        ("missing.npz", "cannot be read: .*No such file"),
        ("", "cannot be read: .*directory"),
    ]:
        with pytest.raises(UserError, match=sentence):
            load_statistics(tmp_path / name, 3)
