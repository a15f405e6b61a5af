"""The arithmetic in which a training multiplies the matrices of its trained linears.

``float`` is torch's own: nothing is replaced. Any other arithmetic is an entry of
:data:`~ptq161.training.arithmetic.registry.ARITHMETICS`: a name and a function that builds an
:class:`~ptq161.training.arithmetic.base.Arithmetic` from the settings of a training, a quantizer each for inputs,
weights and output gradients. To add one:

1. Write a file here with the quantizers, functions ``(matrix, dim) -> matrix`` of the values that the format can hold;
   ``dim`` is the summed dimension of the product that the matrix enters, along which its groups run.
2. Write ``arithmetic(settings, weight) -> Arithmetic`` there, and enter it in the registry. It is called once for each
   matrix of weights, so that a quantizer may keep something between steps: then it is a
   :class:`~ptq161.training.arithmetic.base.StatefulQuantizer`, whose buffers go into the checkpoints.
3. A setting that it needs is a field of :class:`~ptq161.training.arithmetic.base.ArithmeticSettings`, from which the
   settings of trainings (``Restoration``, ``Tuning``) have it; its range is checked in
   :func:`~ptq161.training.arithmetic.registry.check_arithmetic`.

The rest follows from the name: the settings accept it, and the linears of
:mod:`~ptq161.training.arithmetic.linears`, which the trainings put into their students, compute in it. The products
themselves (:mod:`~ptq161.training.arithmetic.product`) are the same for all.
"""
