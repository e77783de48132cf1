"""Generators and critics: `generator(latents, labels) -> images in [-1, 1]` and
`critic(images, labels) -> logits`, where labels are None for unconditional networks."""
