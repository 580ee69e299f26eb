from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers as hf
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from equality import assert_near
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.pixels import as_rgb

NAME = "image-classification"


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 24), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if image.mode in {"CMYK", "I"} else "PNG", **options)
    return buffer.getvalue()


def table_of(images: list[object], feature: object = None) -> Dataset:
    features = Features({"image": feature or ImageFeature(), "label": Value("int64")})
    return Dataset.from_dict(
        {"image": images, "label": [row % 2 for row in range(len(images))]}, features=features
    )


def test_batches_equal_the_processors_own_output(task_of):
    images = [picture(seed=seed, size=(20 + 9 * seed, 50)) for seed in range(4)]
    table = table_of(images)
    task = task_of("vit", table, name=NAME)
    examples = task.encode(table)
    assert {image.dtype for image in examples.columns["pixel_values"]} == {torch.uint8}
    assert examples.columns["pixel_values"][0].shape == (3, 32, 32)
    batch = task.collate(examples, np.array([3, 1]))
    own = task.processor([images[3], images[1]], return_tensors="pt")["pixel_values"]
    assert own.std() > 0.5
    assert_near(batch["pixel_values"], own)
    assert batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(("rescale", "normalise"), [(True, False), (False, False)])
def test_steps_that_a_processor_omits_are_omitted(task_of, rescale, normalise):
    table = table_of([picture()])
    task = task_of("vit", table, name=NAME)
    task.processor.do_rescale, task.processor.do_normalize = rescale, normalise
    own = task.processor([picture()], return_tensors="pt")["pixel_values"]
    assert_near(task.collate(task.encode(table), np.arange(1))["pixel_values"], own.float())


@pytest.mark.parametrize("type", [pa.binary(), pa.large_binary(), pa.string(), pa.large_string()])
def test_bytes_and_paths_are_images_too(task_of, tmp_path, type):
    values: list[object] = [png(picture())]
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        path = tmp_path / "one.png"
        picture().save(path)
        values = [str(path)]
    table = Dataset(pa.table({"image": pa.array(values, type), "label": pa.array([0])}))
    reference = table_of([picture()])
    task = task_of("vit", reference, name=NAME)
    wanted = task.encode(reference).columns["pixel_values"][0]
    assert torch.equal(task.encode(table).columns["pixel_values"][0], wanted)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_any_mode_becomes_rgb(task_of, mode):
    image = (
        picture("L").convert(mode)
        if mode not in {"I;16", "I"}
        else Image.fromarray(np.full((24, 40), 128 * 256, np.uint16)).convert(mode)
    )
    table = table_of([{"bytes": png(image)}, {"bytes": png(picture())}])
    task = task_of("vit", table, name=NAME)
    assert task.encode(table).columns["pixel_values"][0].shape == (3, 32, 32)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert np.asarray(as_rgb(Image.fromarray(ramp)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(as_rgb(Image.fromarray(ramp.astype(np.int32))))[0, :, 0].tolist() == [
        0,
        1,
        128,
        255,
    ]


def test_transparent_palettes_make_no_warning():
    image = Image.open(io.BytesIO(png(picture("P"), transparency=bytes(range(256)))))
    assert "transparency" in image.info
    assert as_rgb(image).mode == "RGB"


def test_the_orientation_tag_is_applied(task_of):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = table_of([{"bytes": png(picture(), exif=exif)}])
    upright = table_of([{"bytes": png(picture().transpose(Image.Transpose.ROTATE_270))}])
    task = task_of("vit", turned, name=NAME)
    assert torch.equal(
        task.encode(turned).columns["pixel_values"][0],
        task.encode(upright).columns["pixel_values"][0],
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"bytes": b"no image"},
            (
                r"row 1 \(from 0, of the rows that the run uses\): "
                r"the image in column 'image' cannot be decoded \(8 bytes\)"
            ),
        ),
        (
            {"bytes": png(picture())[:200]},
            (
                r"row 1 \(from 0, .*\): the image in column 'image' cannot be decoded "
                r"\(200 bytes\)"
            ),
        ),
        (
            {"path": "nowhere/one.png"},
            r"row 1 \(from 0, .*\): the image .* cannot be decoded \(nowhere/one.png\)",
        ),
        ({"path": "https://site.test/a.png"}, r"\(https://site.test/a.png\): URLs are not read"),
        ({"path": "iVBORw0KGgo" * 999}, r"\((iVBORw0KGgo)+iV…\): .{,200}$"),
        ({"path": "", "bytes": None}, "there are neither bytes nor a path"),
        (
            None,
            r"row 1 \(from 0, of the rows that the run uses\): column 'image' is empty \(null\)",
        ),
    ],
)
def test_undecodable_images_are_refused_with_their_row(task_of, value, message):
    table = table_of([picture(), value])
    with pytest.raises(DataError, match=message):
        task_of("vit", table, name=NAME).encode(table)


def test_a_column_that_holds_no_images_is_refused(task_of):
    table = Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
    with pytest.raises(
        DataError, match=r"task.image: column 'image' has the type int64; images are encoded bytes"
    ):
        task_of("vit", table, name=NAME).encode(table)
    with pytest.raises(
        DataError, match=r"task.image: there is no column 'photo'; the data have image, label"
    ):
        task_of("vit", table, name=NAME, image="photo")


def test_the_mean_loss_equals_transformers(task_of, tiny_models):
    table = table_of([picture(seed=seed) for seed in range(3)])
    task = task_of("vit", table, name=NAME, num_labels=5)
    batch = task.collate(task.encode(table), np.arange(3))
    model = hf.AutoModelForImageClassification.from_pretrained(
        tiny_models / "vit", num_labels=5
    ).eval()
    with torch.no_grad():
        output = model(**batch)
    losses, counts = task.losses(output.logits, batch["labels"])
    torch.testing.assert_close(losses.sum() / counts.sum(), output.loss)
