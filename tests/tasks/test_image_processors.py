"""Every image processor of models that classify images, followed tensor for tensor or refused."""

from __future__ import annotations

import builtins
import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.pixels import PixelCode, array_image, as_rgb

NAME = "image-classification"
NEEDS_TORCHVISION = {"PPLCNetImageProcessor", "TimmWrapperImageProcessor"}


def processor_names():
    """Return the Pillow image processor of each model type, or the only one that it has."""
    known = (
        IMAGE_PROCESSOR_MAPPING_NAMES.get(k) for k in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    )
    return sorted({names.get("pil") or names["torchvision"] for names in known if names})


def picture(size=(40, 24), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def table_of(values, feature=None):
    features = Features({"image": feature or ImageFeature(), "label": Value("int64")})
    labels = [row % 2 for row in range(len(values))]
    return Dataset.from_dict({"image": values, "label": labels}, features=features)


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def task_with(task_of, processor, tmp_path, table, **options):
    """Return a task whose image processor is read from a folder, as a user's is."""
    processor.save_pretrained(tmp_path)
    return task_of("vit", table, name=NAME, backbone={"tokenizer": str(tmp_path)}, **options)


def batch_of(task, table):
    return task.collate(task.encode(table), np.arange(len(table)))


def assert_followed(task, table, images):
    """Check that a batch holds exactly what the processor returns for each image alone."""
    batch = batch_of(task, table)
    del batch["labels"]
    for row, image in enumerate(images):
        own = task.processor([image], return_tensors="pt")
        assert batch.keys() == own.keys()
        for name, values in own.items():
            expected = values[0].float() if name == "pixel_values" else values[0]
            assert torch.equal(batch[name][row], expected), name


LARGE = {"DonutImageProcessorPil"}
"""Their default size takes seconds."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LARGE else ())
        for name in processor_names()
    ],
)
def test_batches_hold_exactly_what_the_processor_returns(task_of, tmp_path, name):
    images = [picture()]
    table = table_of(images)
    if name in NEEDS_TORCHVISION:
        (tmp_path / "preprocessor_config.json").write_text(f'{{"image_processor_type": "{name}"}}')
        with pytest.raises(BackboneError, match=r"ImageProcessor of .* cannot be loaded: "):
            task_of("vit", table, name=NAME, backbone={"tokenizer": str(tmp_path)})
        return
    kind = get_image_processor_class_from_name(name)
    if name == "ImageGPTImageProcessorPil":  # it has no default for the colors of its tokens
        with pytest.raises(DataError, match=r"row 0 .*: ImageGPT.* fails .*: Clusters must be"):
            task_with(task_of, kind(), tmp_path, table).encode(table)
        colors = np.random.default_rng(0).uniform(-1, 1, (16, 3)).tolist()
        task = task_with(task_of, kind(clusters=colors), tmp_path, table)
    else:
        task = task_with(task_of, kind(), tmp_path, table)
    assert type(task.processor) is kind
    assert_followed(task, table, images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EfficientNetImageProcessorPil", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
        ("EfficientNetImageProcessorPil", {"include_top": False, "do_normalize": False}),
        ("ViTImageProcessorPil", {"do_rescale": False}),
        ("ViTImageProcessorPil", {"do_normalize": False, "do_rescale": False}),
        ("ViTImageProcessorPil", {"image_std": [0.5, 1.0, 2.0], "do_resize": False}),
        ("MobileViTImageProcessorPil", {"do_flip_channel_order": False}),
        ("SegformerImageProcessorPil", {"do_reduce_labels": True}),
        ("DonutImageProcessorPil", {"size": [30, 20], "do_align_long_axis": True}),
        ("CLIPImageProcessorPil", {"crop_size": 300}),
        ("BitImageProcessorPil", {"do_pad": True, "pad_size": {"height": 256, "width": 256}}),
        ("ViTImageProcessorPil", {"image_std": [1e-30, 1.0, 1.0]}),
    ],
    ids=str,
)
def test_options_of_a_processor_are_followed(task_of, tmp_path, name, options):
    images = [picture(seed=0), picture(seed=1)]
    table = table_of(images)
    processor = get_image_processor_class_from_name(name)(**options)
    assert_followed(task_with(task_of, processor, tmp_path, table), table, images)


def test_pixels_take_one_byte_each(task_of):
    table = table_of([picture()])
    examples = task_of("vit", table, name=NAME).encode(table)
    assert examples.columns["pixel_values"][0].dtype == torch.uint8
    assert examples.lengths.tolist() == [3 * 32 * 32]


def test_pixels_that_bytes_do_not_restore_stay_as_they_are():
    code = PixelCode(torch.tensor([-1.0]), torch.tensor([1.0]))
    levels = torch.linspace(-1, 1, 256).view(1, 16, 16)
    codes, table = code.encode(levels)
    assert codes.dtype == torch.uint8
    assert torch.equal(code.decode(codes, table), levels)
    # one code would stand for two values
    between = torch.cat([levels, levels + 1e-4], dim=1)
    for other in (levels * 2, between):
        kept, table = code.encode(other)
        assert torch.equal(kept, other)
        assert torch.equal(code.decode(kept, table), other)


def test_a_batch_may_mix_images_with_and_without_a_code(task_of):
    images = [picture(seed=0), picture(seed=1)]
    table = table_of(images)
    task = task_of("vit", table, name=NAME)
    own, calls = task.processor, iter(range(9))

    def uneven(images, **options):
        """Return values of the second image that are not those of bytes."""
        output = own(images, **options)
        if np.asarray(images[0]).std() and next(calls):
            output["pixel_values"] = np.sin(output["pixel_values"])
        return output

    task.processor = uneven
    examples = task.encode(table)
    kinds = [pixels.dtype for pixels in examples.columns["pixel_values"]]
    assert kinds == [torch.uint8, torch.float32]
    expected = own(images, return_tensors="np")["pixel_values"]
    batch = task.collate(examples, np.array([1, 0]))
    assert np.array_equal(batch["pixel_values"][0], np.sin(expected[1]))
    assert np.array_equal(batch["pixel_values"][1], expected[0])


def test_images_of_different_sizes_are_refused(task_of, tmp_path):
    table = table_of([picture(), picture(), picture((24, 40))])
    processor = get_image_processor_class_from_name("ViTImageProcessorPil")(do_resize=False)
    task = task_with(task_of, processor, tmp_path, table)
    with pytest.raises(
        BackboneError,
        match=r"ViTImageProcessorPil does not bring images to one size \(pixel_values has the "
        r"shape \(3, 24, 40\) in row 0, but \(3, 40, 24\) in row 2, from 0\)",
    ):
        task.encode(table)


UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 6
FRAMES = [picture(seed=0).quantize(), picture(seed=1).quantize()]
FILES = {
    "gray": file_of(picture().convert("L")),
    "gray and alpha": file_of(picture().convert("LA")),
    "one bit": file_of(picture().convert("1")),
    "alpha": file_of(picture().convert("RGBA")),
    "palette": file_of(picture().convert("P")),
    "palette with a transparent color": file_of(picture().convert("P"), transparency=3),
    "palette with alpha": file_of(picture().convert("P"), transparency=bytes(range(256))),
    "CMYK": file_of(picture().convert("CMYK"), "JPEG"),
    "YCbCr": file_of(picture().convert("YCbCr"), "TIFF"),
    "rotated": file_of(picture(), "JPEG", exif=UPRIGHT),
    "one pixel": file_of(picture((1, 1))),
    "one row": file_of(picture((50, 1))),
    "three columns": file_of(picture((3, 50))),
    "bitmap": file_of(picture(), "BMP"),
    "WebP": file_of(picture(), "WEBP"),
    "animated GIF": file_of(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "two pages": file_of(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_image_of_any_kind_is_processed_upright_as_rgb(task_of, kind):
    table = table_of([{"bytes": FILES[kind]}])
    task = task_of("vit", table, name=NAME)
    opened = Image.open(io.BytesIO(FILES[kind]))
    opened.load()
    upright = ImageOps.exif_transpose(opened)
    if "transparency" in upright.info and upright.mode == "P":
        upright = upright.convert("RGBA")
    assert_followed(task, table, [upright.convert("RGB")])


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (file_of(picture((90, 90)))[:9000], "truncated|Truncated"),
        (file_of(picture((90, 90)), "JPEG")[:900], "truncated"),
        (file_of(picture((90, 90)).quantize(), "GIF")[:2000], "truncated"),
        (file_of(picture((90, 90)), "TIFF")[:9000], "."),
        (file_of(picture((90, 90)), "WEBP")[:900], "."),
        (b"", "cannot identify"),
    ],
    ids=["PNG", "JPEG", "GIF", "TIFF", "WebP", "empty"],
)
def test_a_damaged_file_is_refused_with_its_row(task_of, damaged, reason):
    table = table_of([picture(), {"bytes": damaged}])
    with pytest.raises(DataError, match=rf"row 1 .* cannot be decoded .*({reason})"):
        task_of("vit", table, name=NAME).encode(table)


RAMP = np.array([[0, 64, 128, 255]])


@pytest.mark.parametrize(
    ("values", "white", "expected"),
    [
        (np.array([[0, 256, 32768, 65535]], np.uint16), None, [0, 1, 128, 255]),
        (np.array([[0, 256, 32768, 65535]], np.int32), None, [0, 1, 128, 255]),
        (np.array([[0, 1024, 2048, 4095]], np.uint16), 4095, RAMP[0]),
        (np.array([[0, 2**18, 2**19, 2**20]], np.int32), 2**20, RAMP[0]),
        (RAMP.astype(np.int32), 255, RAMP[0]),
        (np.array([[0, 0.25, 0.5, 1]], np.float32), 1.0, RAMP[0]),
        (np.zeros((1, 4), np.float32), None, [0, 0, 0, 0]),
    ],
    ids=["16 bits", "16 of 32 bits", "12 bits", "20 bits", "8 of 32 bits", "fractions", "black"],
)
def test_more_than_8_bits_are_scaled_by_the_value_of_white(values, white, expected):
    rgb = np.asarray(as_rgb(Image.fromarray(values), white))
    assert rgb.shape == (1, 4, 3)
    assert rgb[0, :, 1].tolist() == pytest.approx(list(expected), abs=0.51)


@pytest.mark.parametrize(
    ("values", "white", "reason"),
    [
        (np.array([[0, 4095]], np.uint16), None, r"uint16 from 0 to 4095, so the value of white"),
        (np.array([[0, 255]], np.int32), None, "set task.white"),
        (np.array([[0, 65536]], np.int32), None, "set task.white"),
        (np.array([[0, 1]], np.float32), None, "set task.white"),
        (np.array([[0, 40000]], np.float32), None, "set task.white"),
        (np.array([[0, 4096]], np.uint16), 4095, "range from 0 to 4096, but task.white is 4095"),
        (np.array([[-1, 5000]], np.int32), None, "range from -1 to 5000"),
        (np.array([[0, np.nan]], np.float32), 1.0, "range from nan to nan, but must not"),
    ],
)  # fmt: skip
def test_an_unknown_value_of_white_is_refused(task_of, values, white, reason):
    table = table_of([picture(), {"bytes": file_of(Image.fromarray(values), "TIFF")}])
    with pytest.raises(DataError, match=rf"row 1 .* cannot be decoded .*{reason}"):
        task_of("vit", table, name=NAME, white=white).encode(table)


def test_nested_lists_of_bytes_are_images(task_of):
    images = [picture(seed=0), picture(seed=1)]
    table = table_of(images)
    task = task_of("vit", table, name=NAME)
    arrays = np.stack([np.asarray(image) for image in images])
    listed = Dataset.from_dict({"image": arrays.tolist(), "label": [0, 1]})
    assert pa.types.is_list(listed.data.schema.field("image").type)
    typed = table_of(list(arrays), Array3D((24, 40, 3), "uint8"))
    for other in (listed, typed):
        assert torch.equal(
            batch_of(task, other)["pixel_values"], batch_of(task, table)["pixel_values"]
        )


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.arange(6), r"the shape \(6,\)"),
        (np.zeros((3, 8, 8), int), r"the shape \(3, 8, 8\)"),
        (np.arange(64).reshape(8, 8), "set task.white"),
        (np.full((2, 2, 3), 256), "set task.white"),
        (np.full((2, 2, 3), 0.5), "set task.white"),
    ],
)
def test_other_nested_lists_are_refused(task_of, array, reason):
    table = Dataset.from_dict({"image": [array.tolist()], "label": [0]})
    with pytest.raises(DataError, match=rf"row 0 .* cannot be decoded \(.*list.*\): .*{reason}"):
        task_of("vit", table, name=NAME).encode(table)


def test_an_array_of_gray_or_of_alpha_is_an_image():
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.asarray(array_image(gray[..., None])).tolist() == np.stack([gray] * 3, -1).tolist()
    alpha = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.asarray(array_image(alpha)).tolist() == alpha[..., :3].tolist()


KINDS = [kind for kind in vars(builtins).values() if isinstance(kind, type)]
BUILTIN = sorted({kind for kind in KINDS if issubclass(kind, Exception)}, key=lambda k: k.__name__)


def raised(kind):
    """Return an exception of a builtin kind with a message."""
    arguments = {
        UnicodeDecodeError: ("utf-8", b"broken", 0, 1, "broken"),
        UnicodeEncodeError: ("utf-8", "broken", 0, 1, "broken"),
        UnicodeTranslateError: ("broken", 0, 1, "broken"),
    }
    if issubclass(kind, BaseExceptionGroup):
        return kind("broken", [ValueError("broken")])
    return kind(*arguments.get(kind, ("broken\nin two lines",)))


@pytest.mark.parametrize("boundary", ["processor", "decoder", "converter"])
def test_whatever_a_library_raises_is_one_error_with_the_row(task_of, monkeypatch, boundary):
    table = table_of([picture(seed=0), picture((9, 9))])
    task = task_of("vit", table, name=NAME)
    kinds = iter(BUILTIN)

    def fail(*_, **__):
        raise raised(next(kinds))

    if boundary == "processor":
        own = task.processor
        task.processor = lambda images, **options: (
            fail() if images[0].width == 9 else own(images, **options)
        )
        place = r"row 1 \(from 0, .*\): function fails on the image of 9 × 9 pixels: "
    else:
        decoder = boundary == "decoder"
        owner, name = (ImageFeature, "decode_example") if decoder else (Image.Image, "convert")
        monkeypatch.setattr(owner, name, fail)
        place = r"row 0 \(from 0, .*\): the image in column 'image' cannot be decoded "
    for _ in BUILTIN:
        with pytest.raises(DataError, match=place + ".*broken") as caught:
            task.encode(table)
        assert "\n" not in str(caught.value)
    assert next(kinds, None) is None
