"""Why a site was left as it is: one class each; ``str`` says what blocked it, ``unblock`` what would change that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Reason:
    """``detail`` names the thing in the user's model; ``where`` is "file.py:line" of the blocking operation, or ""."""

    detail: str = ""
    where: str = ""
    message: ClassVar[str] = ""
    unblock: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        text = self.message.format(detail=self.detail)
        return f"{text} ({self.where})" if self.where else text


class Declined(Exception):
    """Raised by a pass that cannot prove what it would need; ends the work on one site."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class RandomNumbers(Reason):
    message = "random numbers are drawn in a way that cannot be drawn again in the backward pass: {detail}"
    unblock = "use dropout, rand or bernoulli with torch's own generator, behind the softmax"


class ProbabilitiesUsed(Reason):
    message = "the scores, or what is made of them, are also used by {detail}"
    unblock = "use the weights that the softmax or its dropout gives, or the logsumexp of the scores: fuse gives these too"


class ScoresUsed(Reason):
    message = "all scores of a row are needed at once, in {detail}"
    unblock = "read one number of each row or key, and choose nothing by comparing a score with it"


class NotSoftmax(Reason):
    message = "the normalisation is no softmax over the keys: {detail}"
    unblock = "write it as softmax over the key dimension"


class WrongDimension(Reason):
    message = "the softmax runs over another dimension than the product with the values: {detail}"
    unblock = "nothing: this is no attention over keys"


class HeadsMixed(Reason):
    message = "heads are mixed {detail} the softmax: each weight reads the scores of all heads"
    unblock = "nothing yet: a kernel would hold the scores of all heads at once, as many tiles as there are heads"


class WeightNotLinear(Reason):
    message = "what follows the softmax is not linear in the probabilities: {detail}"
    unblock = "move the operation behind the product with the values, or into the scores"


class SeveralSoftmaxes(Reason):
    message = "several softmaxes are in the weights, which are not a sum of them: {detail}"
    unblock = "write the weights as a sum of softmaxes, each with a factor"


class NoScoreProduct(Reason):
    message = "no product of query and key was found behind the softmax: {detail}"
    unblock = "nothing: the scores come from elsewhere"


class ScoresJoined(Reason):
    message = "scores of several sets of keys are joined that are not those of one query: {detail}"
    unblock = "multiply one query with the keys of all sets, each in one product"


class ChainOfProducts(Reason):
    message = "nothing stands between two products but factors: there are no scores that would have to be kept apart"
    unblock = "nothing: it is no attention, and may be computed in another order"


class NothingSaved(Reason):
    message = "nothing would be saved here: {detail}"
    unblock = "nothing: it pays for longer sequences"


class NotLinear(Reason):
    message = "{detail} cannot be read with fixed strides"
    unblock = "bring it into a (batch, position, feature) layout"


class UnsupportedShape(Reason):
    message = "{detail}"
    unblock = "give the head dimensions fixed sizes"


class UnsupportedType(Reason):
    message = "dtype or layout not supported: {detail}"
    unblock = "use dense float32, bfloat16, float16 or float64 tensors"


class IntegersWrap(Reason):
    message = "arithmetic of positions may leave its dtype: {detail}"
    unblock = "keep positions small: kernels take them for the integers of mathematics"


class Subclass(Reason):
    message = "{detail}: a subclass of Tensor may give every operation another meaning"
    unblock = "hand plain tensors to the attention (DTensor: to_local(), or use_local_output=True)"


class Distributed(Reason):
    message = "its tensors are DTensors, and {detail}"
    unblock = "hand each rank's part to the attention (to_local(), or use_local_output=True)"


class Mutated(Reason):
    message = "{detail} is written in place between its use in the attention and the end of it"
    unblock = "use an out-of-place operation"


class StateChanges(Reason):
    message = "the attention spans {detail}"
    unblock = "keep scores, softmax and values under one grad mode and outside of vmap"


class Transformed(Reason):
    message = "the attention is differentiated {detail}, for which there is no kernel"
    unblock = "differentiate it once, in reverse: backward(), torch.func.grad, vjp or jacrev"


class NotTraceable(Reason):
    message = "the region could not be traced: {detail}"
    unblock = "report it, with the model"


class UnreadOperator(Reason):
    message = "{detail} is an operator that fuse does not read"
    unblock = "call scaled_dot_product_attention, or write the attention out"


class UnreadBody(Reason):
    message = "it stands inside of {detail}, whose body fuse does not read"
    unblock = "move it out of there"


class OtherDevice(Reason):
    message = "there are no kernels for tensors on {detail}"
    unblock = "move the model, or choose a target that has kernels there"


class NotSpread(Reason):
    message = "it cannot be computed over several ranks: {detail}"
    unblock = "give it what lies on each rank alone as tensors with one place for each position of the shard"


class KernelRefused(Reason):
    message = "its kernel was refused: {detail}"
    unblock = "send the kernel's source, which the warning names"


class EditRefused(Reason):
    message = "an edit was refused: {detail}"
    unblock = "correct the file, or delete it to have the kernel as it was rendered; qualify='never' takes it unchecked"


class Slower(Reason):
    message = "left to {detail}"
    unblock = "nothing: it runs as fast as it can here; qualify='never' fuses it all the same"


class InternalError(Reason):
    message = "a pass of fuse failed: {detail}"
    unblock = "report it, with the model; the site runs as it did"
