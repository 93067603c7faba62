"""A pipeline that flowdistill exported; it needs PyTorch and diffusers alone."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FlowMapPipeline(DiffusionPipeline):
    """Samples of a flow map, by one jump from noise to data or several.

    Args:
        flow_map: the network.
        scheduler: FlowMapEulerDiscreteScheduler.
        vae: the autoencoder of latents.
        images: what turns samples into images: their scale and bias, the values of black and white, the size of the
            part in the middle that is the image, and whether an autoencoder is needed.
    """

    model_cpu_offload_seq = "flow_map->vae"
    _optional_components = ("vae",)

    def __init__(self, flow_map, scheduler, vae=None, images=None):
        super().__init__()
        self.register_modules(flow_map=flow_map, scheduler=scheduler, vae=vae)
        self.register_to_config(images=images)

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size=1,
        guidance_scale=None,
        num_inference_steps=1,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Draw samples.

        Args:
            class_labels: a class for each sample, of a network that is conditional.
            batch_size: how many samples, of a network that is not.
            guidance_scale: of a network that takes one; None is its own.
            num_inference_steps: jumps from noise to data.
            generator: of the noise.
            latents: the noise itself, in place of draws.
            output_type: "pil", "np" or "pt" are images, in [0, 1] where they are numbers; "latent" is the samples as
                the network makes them, and so are samples that are no images.
            return_dict: whether to return an output with the field ``images``, or a tuple.
        """
        about, device = self.flow_map.config, self._execution_device
        shape, images = tuple(about.sample_shape), self.config.images
        if (class_labels is None) != (about.num_classes is None):
            raise ValueError("class_labels are missing" if class_labels is None else "there are no class_labels here")
        if guidance_scale is not None and about.guidance_scale is None:
            raise ValueError("this network takes no guidance_scale")
        if about.anchored and num_inference_steps != 1:
            raise ValueError("this network makes one jump alone: num_inference_steps is 1")
        if output_type != "latent" and images["needs_vae"] and self.vae is None:
            raise ValueError("samples are latents: load the pipeline with vae=, or take output_type='latent'")

        # The noise and what it is to become.
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=device).long().reshape(-1)
            if bool(((class_labels < 0) | (class_labels >= about.num_classes)).any()):
                raise ValueError(f"class_labels lie in [0, {about.num_classes})")
            batch_size = len(class_labels)
        guidance_scale = about.guidance_scale if guidance_scale is None else guidance_scale
        noise = randn_tensor((batch_size, *shape), generator=generator, device=device) if latents is None else latents
        x = noise.to(device, torch.float32)

        # The jumps.
        times = about.start * torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        self.scheduler.set_timesteps(sigmas=times[:-1].tolist(), device=device)
        ends = [*self.scheduler.timesteps[1:].tolist(), 0.0]
        for t, end in self.progress_bar(zip(self.scheduler.timesteps, ends, strict=True), len(ends)):
            r = 0.0 if about.renoise else end
            x = self.scheduler.step(self.flow_map(x, t, r, class_labels, guidance_scale), t, x, r).prev_sample
            if about.renoise and end > 0:
                fresh = randn_tensor(x.shape, generator=generator, device=device)
                x = self.scheduler.scale_noise(x, torch.tensor([end]), fresh)

        # The images.
        if len(shape) == 3 and output_type != "latent":
            x = self.decode(x)
            x = x if output_type == "pt" else x.cpu().permute(0, 2, 3, 1).numpy()
            x = self.numpy_to_pil(x) if output_type == "pil" else x
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)

    def decode(self, x):
        """Images in [0, 1] of samples."""
        about = self.config.images
        scale, bias = (torch.tensor(about[name], device=x.device) for name in ("scale", "bias"))
        scale, bias = (value if value.ndim == 3 else value.reshape(-1, 1, 1) for value in (scale, bias))
        x = (x - bias) / scale
        if self.vae is not None:
            x = torch.cat([self.vae.decode(one).sample.float() for one in x.to(self.vae.dtype).split(1)])
        x = (x - about["black"]) / (about["white"] - about["black"])
        if about["crop"] is not None:
            margin = (x.shape[-1] - about["crop"]) // 2
            x = x[..., margin : margin + about["crop"], margin : margin + about["crop"]]
        return x.clamp(0, 1)
