"""`transformers.Trainer` as a holdfast run:

    from holdfast.train.huggingface import Callback

    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Callback("s3://bucket/runs/gpt")])
    trainer.train()

Nothing of holdfast imports this package, so transformers is needed only by those who do.
"""

from holdfast.train.huggingface.callback import Callback

__all__ = ["Callback"]
