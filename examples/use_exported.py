"""Tokens by an exported model, onnxruntime alone: use_exported.py model.onnx conditions.npy tokens.npy"""

import json
import sys

import numpy as np
import onnxruntime

model, conditions, output = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
sizes = json.loads(session.get_modelmeta().custom_metadata_map["blip3o_dit"])["sizes"]
condition = np.load(conditions).astype(np.float32)  # [batch, tokens, width], in the units of the data
shape = (len(condition), sizes["num_tokens"], sizes["target_dim"])
noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
(tokens,) = session.run(None, {"condition": condition, "noise": noise})
np.save(output, tokens)
print(tokens.shape)
