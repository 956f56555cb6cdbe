"""The same step with what others offer for measuring task gradients. Each is optional."""

from __future__ import annotations

import importlib
import warnings

import torch


def available(make, case):
    """A step by a peer, or None after a line that says why it does not run here."""
    name = make.__doc__.split(":")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = make(case)
            step()
        return name, step
    except Exception as error:  # whatever it is, the others are still to be measured
        print(f"  {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:110]}")
        return name, None


def torchjd_jac(case):
    """TorchJD jac + joint backward: the whole Jacobian, no Gramian per layer."""
    jac = importlib.import_module("torchjd.autojac").jac
    model, optimizer = case.fresh()
    parameters = [dict(model.named_parameters())[n] for n in _names(case)]

    def backward(losses):
        rows = jac(list(losses.values()), parameters, retain_graph=True, parallel_chunk_size=1)
        matrix = torch.cat([row.flatten(1) for row in rows], 1)
        _ = matrix @ matrix.T
        case.joint(losses)

    return case.step_of(model, optimizer, backward)


def torchjd_engine(case):
    """TorchJD Engine + joint backward: the Gramian of all layers together."""
    engine_class = importlib.import_module("torchjd.autogram").Engine
    model, optimizer = case.fresh()
    engine = engine_class(model.trunk, batch_dim=None)

    def backward(losses):
        gramian = engine.compute_gramian(torch.stack(list(losses.values())))
        torch.stack(list(losses.values())).backward(gramian.sum(0).sign().abs())

    return case.step_of(model, optimizer, backward)


def gradnorm_pytorch(case):
    """gradnorm-pytorch: norms on one parameter, as part of its own reweighting."""
    weighter_class = importlib.import_module("gradnorm_pytorch").GradNormLossWeighter
    model, optimizer = case.fresh()
    last = [p for n, p in model.named_parameters() if n.startswith("trunk") and p.ndim > 1][-1]
    weighter = weighter_class(num_losses=len(case.weights), learning_rate=1e-6, grad_norm_parameters=last)
    return case.step_of(model, optimizer, lambda losses: weighter.backward(list(losses.values())))


def cockpit_economy(case):
    """Cockpit, economy: no tasks; its quantities of the joint loss."""
    backpack = importlib.import_module("backpack")
    cockpit = importlib.import_module("cockpit")
    quantities = importlib.import_module("cockpit.utils.configuration").configuration("economy")
    model, optimizer = case.fresh()
    backpack.extend(model, use_converter=False)
    watched = [p for p in model.parameters() if p.requires_grad]
    instrument = cockpit.Cockpit(watched, quantities=quantities)
    return _with_cockpit(case, model, optimizer, instrument)


def cockpit_norm(case):
    """Cockpit, GradNorm only: no tasks; the norm of the joint gradient."""
    importlib.import_module("backpack")
    cockpit = importlib.import_module("cockpit")
    quantity = importlib.import_module("cockpit.quantities").GradNorm(track_schedule=lambda step: True)
    model, optimizer = case.fresh()
    return _with_cockpit(case, model, optimizer, cockpit.Cockpit(model.parameters(), quantities=[quantity]))


def _with_cockpit(case, model, optimizer, instrument):
    count = iter(range(10**9))

    def backward(losses):
        step, total = next(count), sum(losses.values())
        info = {"batch_size": 16, "individual_losses": total.repeat(16), "loss": total, "optimizer": optimizer}
        with instrument(step, info=info):
            total.backward(create_graph=instrument.create_graph(step))

    return case.step_of(model, optimizer, backward)


def _names(case):
    names = {id(p): n for n, p in case.model.named_parameters()}
    return [names[id(p)] for p in case.shared().parameters]


ALL = (torchjd_jac, torchjd_engine, gradnorm_pytorch, cockpit_norm, cockpit_economy)
