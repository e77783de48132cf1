import pytest
import torch

from ganscale.networks.resampling import PooledConv2d, UpsampledConv2d, merged_kernels


@pytest.mark.parametrize("size", [1, 3, 5])
def test_both_match_their_definition(size: int) -> None:
    """Written out as sums over the kernel's taps; the image is zero outside."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 4, dtype=torch.float64)

    def convolved(layer: PooledConv2d | UpsampledConv2d, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        assert layer.bias is not None
        output = layer.bias.view(-1, 1, 1) + torch.zeros(2, 4, height, width, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                for i in range(size):
                    for j in range(size):
                        y, x = row + i - size // 2, column + j - size // 2
                        if 0 <= y < height and 0 <= x < width:
                            tap = layer.weight[:, :, i, j]
                            output[:, :, row, column] += images[:, :, y, x] @ tap.t()
        return output

    pooled = PooledConv2d(3, 4, size).double()
    quarters = convolved(pooled, images).unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    torch.testing.assert_close(pooled(images), quarters.mean((3, 5)), rtol=1e-13, atol=1e-13)

    upsampled = UpsampledConv2d(3, 4, size).double()
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        upsampled(images), convolved(upsampled, larger), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("kind", [PooledConv2d, UpsampledConv2d])
def test_an_image_without_a_batch_is_computed_in_the_merged_form_too(kind) -> None:
    layer, image = kind(3, 4, 3), torch.randn(3, 6, 4)
    expected = layer(image[None])[0]
    with merged_kernels():
        torch.testing.assert_close(layer(image), expected)


@pytest.mark.parametrize("layer", [PooledConv2d, UpsampledConv2d])
def test_an_even_kernel_is_refused(layer: type[PooledConv2d]) -> None:
    with pytest.raises(ValueError, match="even size, 4"):
        layer(3, 3, 4)
