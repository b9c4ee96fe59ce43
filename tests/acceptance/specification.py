"""The blocks of the user's specification, as they are written there."""

PROJECT_STRUCTURE = """
src/__init__.py
src/modules/__init__.py
src/modules/config/__init__.py
src/modules/config/blip3o_config.py
src/modules/models/__init__.py
src/modules/models/blip3o_dit.py
src/modules/models/lumina_nextdit2d.py
src/modules/losses/__init__.py
src/modules/losses/flow_matching_loss.py
src/modules/datasets/__init__.py
src/modules/datasets/blip3o_dataset.py
src/modules/trainers/__init__.py
src/modules/trainers/blip3o_trainer.py
src/modules/inference/__init__.py
src/modules/inference/blip3o_inference.py
train_blip3o_dit.py
requirements.txt
"""

VERIFY_INSTALLATION = """
python -c "from src.modules.models.blip3o_dit import BLIP3oDiTModel; print('✅ Installation successful')"
"""

TEST_DATASET = """
python -c "from src.modules.datasets.blip3o_dataset import test_blip3o_dataset; test_blip3o_dataset('path/to/blip3o_grid_embeddings.pkl')"
"""  # noqa: E501

QUICK_START = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit \
  --num_epochs 10 \
  --batch_size 32 \
  --learning_rate 1e-4
"""

FULL_CONFIGURATION = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit-large \
  \
  --model_dim 1792 \
  --num_layers 24 \
  --num_heads 28 \
  --gradient_checkpointing \
  \
  --num_epochs 20 \
  --batch_size 16 \
  --eval_batch_size 32 \
  --gradient_accumulation_steps 4 \
  --learning_rate 5e-5 \
  --weight_decay 0.01 \
  --warmup_steps 2000 \
  \
  --sigma_min 1e-4 \
  --sigma_max 1.0 \
  --prediction_type v_prediction \
  --regularization_weight 0.0 \
  \
  --eval_split 0.1 \
  --normalize_embeddings \
  --num_workers 4 \
  \
  --fp16 \
  --logging_steps 100 \
  --save_steps 1000 \
  --eval_steps 1000 \
  \
  --wandb_project blip3o-experiments \
  --wandb_run_name large-model-v1
"""

DEBUG = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./debug \
  --debug
"""

RESUME = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit \
  --resume_from_checkpoint ./checkpoints/blip3o-dit/checkpoint-5000
"""

DRY_RUN = r"""
python train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./debug \
  --debug \
  --dry_run  # Just test setup without training
"""

CONFIGURE_DISTRIBUTED = "accelerate config"

DISTRIBUTED = r"""
accelerate launch train_blip3o_dit.py \
  --embeddings_path path/to/blip3o_grid_embeddings.pkl \
  --output_dir ./checkpoints/blip3o-dit-distributed \
  --batch_size 16 \
  --gradient_accumulation_steps 2
"""

PYTHON_API = """
from src.modules.inference.blip3o_inference import BLIP3oInference
import torch

# Load trained model
inference = BLIP3oInference("./checkpoints/blip3o-dit")

# Generate CLIP embeddings from EVA-CLIP conditioning
eva_embeddings = torch.randn(4, 64, 1280)  # Batch of 4 samples
generated_clip = inference.generate(
    eva_embeddings=eva_embeddings,
    num_inference_steps=50
)

print(f"Generated CLIP embeddings: {generated_clip.shape}")  # [4, 64, 768]
"""

BATCH_GENERATION = """
from src.modules.inference.blip3o_inference import BLIP3oInference

inference = BLIP3oInference("./checkpoints/blip3o-dit")

# Generate samples from dataset
results = inference.generate_from_dataset(
    dataset_path="path/to/blip3o_grid_embeddings.pkl",
    num_samples=100,
    batch_size=8,
    num_inference_steps=50,
    output_path="./results/generated_samples.pkl",
    compute_metrics=True
)

print("Generation metrics:", results['generation_metrics'])
"""

MODEL_EVALUATION = """
# Evaluate model with flow matching loss
eval_metrics = inference.evaluate_model(
    dataset_path="path/to/blip3o_grid_embeddings.pkl",
    batch_size=32,
    split="eval"
)

print("Evaluation metrics:", eval_metrics)
"""

CUSTOM_MODEL = """
from src.modules.config.blip3o_config import BLIP3oDiTConfig
from src.modules.models.blip3o_dit import BLIP3oDiTModel

# Create custom configuration
config = BLIP3oDiTConfig(
    model_dim=2048,
    num_layers=32,
    num_heads=32,
    gradient_checkpointing=True,
)

# Create model
model = BLIP3oDiTModel(config)
"""

CUSTOM_LOSS = """
from src.modules.losses.flow_matching_loss import BLIP3oFlowMatchingLoss

loss_fn = BLIP3oFlowMatchingLoss(
    sigma_min=1e-5,
    sigma_max=2.0,
    prediction_type="v_prediction",
    regularization_weight=0.1,
)
"""
