"""Paper B's reward model: an MLP on frozen CLIP ViT-L/14 embeddings, from binary feedback.

  command    python -m rahf.reward.train --feedback=FILE --clip=DIR --workdir=DIR
  hardware   one GPU; the MLP has 2,624,513 parameters
  result     not yet measured
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.kind = "reward"
    config.seed = 0
    config.tracker = "tensorboard"  # or "wandb:PROJECT", "trackio:PROJECT", beside it
    config.prompts = dict(  # an open replication's counts, colours and backgrounds; the things are ours
        count=("one", "two", "three", "four", "five", "six"),
        colour=("red", "yellow", "green", "blue", "black", "pink", "purple", "white", "brown"),
        thing=(
            *("dog", "cat", "rabbit", "bird", "horse", "lion", "tiger", "elephant", "zebra", "sheep/sheep", "cow", "pig"),
            *("wolf/wolves", "monkey", "frog", "fish/fish", "car", "bicycle", "boat", "cup", "chair", "book", "apple"),
            *("flower", "backpack"),
        ),
        background=(
            *("in the forest", "in the city", "on the moon", "in the field", "in the sea", "on the table", "in the desert"),
            "in San Francisco",
        ),
    )
    config.model = dict(hidden=(1024, 1024))
    config.loss = dict(
        num_prompts=10,  # N, the image's own included
        temperature=2.0,  # T
        classification_weight=0.5,  # lambda
        change=("count", "colour", "thing", "background"),  # what a negative may differ in; each is drawn as often
    )
    config.train = dict(  # not in the paper
        batch_size=256,
        num_steps=2000,  # at most
        learning_rate=3e-4,  # falls to 0 along a cosine
        weight_decay=0.01,
        eval_every=50,  # steps
        patience=10,  # validations without a better one, after which training ends
    )
    config.eval = dict(
        validation=0.15,  # of the images, chosen by their content
        data_sizes=(0.0625, 0.125, 0.25, 0.5, 1.0),  # of the training part, for the plot
    )
    return config
