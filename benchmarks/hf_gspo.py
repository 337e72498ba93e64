"""The released formulation of a GSPO iteration on torch and transformers: the prompt is repeated for every completion.

Source: src/r1-v/src/open_r1/trainer/grpo_trainer.py:371-384 (log-probabilities), 585-706 (sampling, loss).
"""

import contextlib
import copy

import hf_model
import torch

from openo3_jax.config import GSPOConfig


class Iteration:
    """A policy, its frozen reference and AdamW, for one prompt (`hf_model.inputs`).

    Gradient checkpointing is on, as released; sdpa in the place of flash-attn. `autocast`: of the forward passes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompt: dict[str, torch.Tensor],
        config: GSPOConfig,
        autocast: contextlib.AbstractContextManager | None = None,
    ):
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy, self.prompt, self.config = model, prompt, config
        self.first = prompt["input_ids"].shape[1]  # slot of a completion's first token
        self.autocast = autocast or contextlib.nullcontext()
        adam = config.optimizer
        betas = (adam.beta1, adam.beta2)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=adam.learning_rate, betas=betas, eps=adam.eps, weight_decay=adam.weight_decay
        )

    @torch.no_grad()
    def sample(self) -> torch.Tensor:
        """Prompt and completion `[group, tokens]`."""
        sampling = self.config.sampling
        self.policy.eval()
        with self.autocast:
            whole = self.policy.generate(
                **self.prompt,
                use_cache=True,
                do_sample=True,
                top_k=0,
                max_new_tokens=sampling.max_new_tokens,
                num_return_sequences=sampling.num_samples,
            )
        assert whole.shape == (sampling.num_samples, self.first + sampling.max_new_tokens)
        return whole

    def update(self, whole: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """Policy, reference, loss, backward, AdamW; log-probabilities, the loss and the gradient's norm."""
        config = self.config
        self.policy.train()
        logp = self.logp_of(self.policy, whole)
        with torch.no_grad():
            reference_logp = self.logp_of(self.reference, whole)
        advantage = torch.linspace(-1, 1, len(whole), device=whole.device)[:, None]
        x = torch.clip(reference_logp - logp, -10, 10)
        ratio = torch.exp((logp - logp.detach()).mean(1, keepdim=True))
        clipped = torch.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        loss = (config.kl_coef * (torch.exp(x) - x - 1) - surrogate).mean(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.optimizer.clip_norm)
        self.optimizer.step()
        return logp.detach(), float(loss.detach()), float(norm)

    def logp_of(self, model: torch.nn.Module, whole: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the completions `[group, tokens]`, row by row, from logits of every slot."""
        with self.autocast:
            logits = model(**hf_model.repeated(self.prompt, whole), use_cache=False).logits[:, self.first - 1 : -1]
        new = whole[:, self.first :, None]
        rows = [torch.log_softmax(row.float(), -1).gather(1, ids) for row, ids in zip(logits, new, strict=True)]
        return torch.stack(rows)[..., 0]
