"""StyleGAN2: "Analyzing and Improving the Image Quality of StyleGAN" (Karras et al. 2020,
https://arxiv.org/abs/1912.04958), at 16 to 1024 pixels, with the critic of a class as in "Training
Generative Adversarial Networks with Limited Data" (https://arxiv.org/abs/2006.06676).

Convolutions take no more passes over their maps than they need. An activation is sqrt(2) times a
leaky ReLU; that factor waits for the next weights or styles, where a multiplication costs little.
"""
