"""A Lightning training as a holdfast run, with `lightning.pytorch` and with `pytorch_lightning`:

    from holdfast.train.lightning import Callback

    trainer = Trainer(max_epochs=3, callbacks=[Callback("s3://bucket/runs/gpt")])
    trainer.fit(model, loader)

Nothing of holdfast imports this package, so Lightning is needed only by those who do.
"""

from holdfast.train.lightning.callback import Callback

__all__ = ["Callback"]
