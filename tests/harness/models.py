"""Flags of the small GPTs that are trained outside the product.

Megatron takes the last of two equal flags, so that one model is written as a difference to another.
"""

__all__ = ["GPT2", "ITERATIONS", "LOCAL", "PARAMETERS", "SHAPE", "TINY"]

#: 2 layers, 120,576 parameters.
SHAPE = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64""".split()
#: :data:`SHAPE` with 4 sequences of 64 made-up tokens a step. Each rank makes them by itself:
#: forking processes that load data takes a third of such a short run.
TINY = [
    *SHAPE,
    *"""--micro-batch-size 1 --global-batch-size 4 --lr 3e-3 --lr-warmup-iters 2
    --lr-decay-style cosine --weight-decay 0.01 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 255 --log-interval 1 --eval-iters 1 --eval-interval 1000
    --num-workers 0""".split(),
]
PARAMETERS = 120_576
#: Steps of a run, where its flags do not say otherwise.
ITERATIONS = 6
#: GPT-2's 12 layers of 768, embeddings untied: 163M parameters, one step.
GPT2 = [
    *TINY,
    *"""--num-layers 12 --hidden-size 768 --num-attention-heads 12 --max-position-embeddings 1024
    --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-4 --lr-warmup-iters 0
    --lr-decay-style linear --weight-decay 0.1 --vocab-size 50256 --eval-iters 0
    --untie-embeddings-and-output-weights""".split(),
]
#: Layers of torch's own operations, which need neither Transformer Engine nor Apex nor a compiler.
LOCAL = """--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-persist-layer-norm --no-bias-gelu-fusion --no-bias-dropout-fusion""".split()
