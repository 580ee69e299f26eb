"""Made sounds of three kinds as WAV files, and tiny models of audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers as hf
from scipy.io import wavfile

RATE = 2000
"""Samples per second of the sounds and the models."""
KINDS = ["buzz", "hum", "whistle"]
PITCHES = {"buzz": 60.0, "hum": 180.0, "whistle": 500.0}


def tone(kind, number, seconds=None):
    """A tone with noise, ``(n,)``; the lengths of three numbers in a row differ."""
    random = np.random.default_rng(number)
    size = int(RATE * (seconds or (0.15, 0.2, 0.25)[number % 3]))
    wave = np.sin(2 * np.pi * PITCHES[kind] * np.arange(size) / RATE)
    return (0.4 * wave + 0.1 * random.uniform(-1, 1, size)).astype(np.float32)


def write_wave(path, samples, rate=RATE, dtype=np.int16):
    """Write a WAV file with integers of 8, 16 or 32 bits, or with floats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if dtype == np.uint8:
        samples = np.round(samples * 127) + 128
    elif np.dtype(dtype).kind == "i":
        samples = np.round(samples * np.iinfo(dtype).max)
    wavfile.write(path, rate, samples.astype(dtype))
    return str(path)


def write_folder(folder, count=12):
    """Files in a folder for each kind; returns their paths and kinds in the order of the files."""
    rows = []
    for number in range(count):
        kind = KINDS[number % 3]
        path = write_wave(folder / kind / f"{number:02}.wav", tone(kind, number))
        rows.append({"audio": path, "label": kind})
    return rows


def write_wav2vec2(folder, norm="layer", kind="Wav2Vec2"):
    """A tiny Wav2Vec2 or Hubert model; with ``layer``, padding does not change its outputs."""
    config = getattr(hf, f"{kind}Config")(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        classifier_proj_size=8,
        conv_dim=(8, 8),
        conv_kernel=(10, 4),
        conv_stride=(5, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(hf, f"{kind}Model")(config).save_pretrained(folder)
    hf.Wav2Vec2FeatureExtractor(
        sampling_rate=RATE, do_normalize=True, return_attention_mask=norm == "layer"
    ).save_pretrained(folder)
    return Path(folder)


def write_ast(folder):
    """A tiny audio spectrogram transformer, whose inputs have one size."""
    config = hf.ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=16,
        num_mel_bins=16,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.ASTModel(config).save_pretrained(folder)
    hf.ASTFeatureExtractor(
        sampling_rate=RATE, num_mel_bins=16, max_length=16, mean=-4.0, std=4.5
    ).save_pretrained(folder)
    return Path(folder)
