"""A checkpoint cannot be loaded into an optimizer with another learning rate.  One process."""

import small_model

small_model.start()
errors = []
for sharded in (True, False):
    model, optimizer = small_model.build(lr=0.1, sharded=sharded)
    small_model.step(model, optimizer)
    saved = optimizer.state_dict()
    model, optimizer = small_model.build(lr=0.05, sharded=sharded)
    small_model.step(model, optimizer)  # makes the state of torch's Adam
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:
        kind = type((optimizer.chained_optimizers or [optimizer])[0]).__name__
        errors.append(f"{kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
small_model.end("; ".join(errors) or None)
