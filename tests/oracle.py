"""Algorithm 1 of arXiv:2303.00565 in float64 NumPy, written from the paper and from nothing in this package.

Each `fault` puts in one thing that is easily got wrong; a test that passes with a fault tests nothing.
"""

import numpy as np

FAULTS = ("bias_correction", "added_epsilon", "norm_per_parameter", "no_maximum", "zero_seed", "coupled_decay")


class Oracle:
    """params: list of arrays. groups: dicts of lr, betas, eps, weight_decay, rho and `index`, their positions."""

    def __init__(self, params, groups, fault=None):
        self.x = [np.array(p, dtype=np.float64) for p in params]
        self.groups, self.fault, self.t = groups, fault, 0
        self.m = [np.zeros_like(x) for x in self.x]
        self.v = [np.zeros_like(x) for x in self.x]
        self.v_hat = [np.zeros_like(x) for x in self.x]
        for group in groups:
            for i in group["index"]:
                self.v_hat[i] += 0.0 if fault in ("zero_seed", "added_epsilon") else group["eps"] ** 2

    def perturbed(self, s):
        """x + δ for the ascent gradients s (None where a parameter has none)."""
        total = np.sqrt(sum(float(np.sum(np.square(g))) for g in s if g is not None))
        out = [x.copy() for x in self.x]
        for group in self.groups:
            for i in group["index"]:
                if s[i] is None:
                    continue
                norm = np.linalg.norm(s[i]) if self.fault == "norm_per_parameter" else total
                out[i] = out[i] + group["rho"] * s[i] / norm
        return out

    def update(self, g):
        """One step from the gradients g at x + δ."""
        self.t += 1
        for group in self.groups:
            (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for i in group["index"]:
                if g[i] is None:
                    continue
                gradient = g[i]
                if self.fault == "coupled_decay":
                    gradient = gradient + decay * self.x[i]
                else:
                    self.x[i] = self.x[i] * (1 - lr * decay)
                self.m[i] = b1 * self.m[i] + (1 - b1) * gradient
                self.v[i] = b2 * self.v[i] + (1 - b2) * gradient**2
                self.v_hat[i] = self.v[i] if self.fault == "no_maximum" else np.maximum(self.v_hat[i], self.v[i])
                m, v_hat = self.m[i], self.v_hat[i]
                if self.fault == "bias_correction":
                    m, v_hat = m / (1 - b1**self.t), v_hat / (1 - b2**self.t)
                root = np.sqrt(v_hat) + (group["eps"] if self.fault == "added_epsilon" else 0.0)
                self.x[i] = self.x[i] - lr * m / root
