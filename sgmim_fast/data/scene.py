"""Renders a scene of spheres, boxes and cards in a room, with its exact depth.

The camera is at the origin and faces +z; x points right, y down. The ray of a pixel has the direction (u, v, 1), so
that the ray parameter of a hit is its depth z. A card is a box without thickness; the room is a box seen from inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
BACKGROUND, SPHERE, BOX, PLANE = range(4)  # class ids of the labels
NEAREST, FARTHEST = 2.0, 7.0  # range of the depth of objects' centres
PATTERNS = ("plain", "checks", "stripes", "dots", "clouds")


@dataclass
class Texture:
    """A solid texture: two colours mixed by a pattern in space, evaluated at the points of a surface."""

    colours: Array  # (2, 3), 0 to 1
    pattern: str
    waves: Array  # (3, 3): rows are wave vectors, in units of 2π per unit of length
    phase: Array  # (3,)

    def __call__(self, points: Array) -> Array:
        """Returns the colours, (3, P), at points (3, P) in the object's frame."""
        if self.pattern == "plain":
            return np.broadcast_to(self.colours[0][:, None], points.shape)
        waves = self.waves @ points + self.phase[:, None]
        if self.pattern == "checks":
            mix = np.floor(waves).sum(0) % 2
        elif self.pattern == "stripes":
            mix = waves[0] % 1 < 0.5
        elif self.pattern == "dots":
            mix = ((waves % 1 - 0.5) ** 2).sum(0) < 0.12
        else:
            mix = 0.5 + np.sin(2 * np.pi * waves).sum(0) / 6
        return self.colours[0][:, None] + (self.colours[1] - self.colours[0])[:, None] * mix


@dataclass
class Solid:
    """One object, or the room (BACKGROUND)."""

    kind: int  # SPHERE, BOX, PLANE or BACKGROUND
    centre: Array  # (3,)
    half: Array  # (3,): half the lengths of a box's edges; for a sphere its radius, three times
    axes: Array  # (3, 3): columns are the directions of the edges
    texture: Texture

    @property
    def reach(self) -> float:
        """Radius of the bounding sphere around the centre."""
        return float(self.half[0] if self.kind == SPHERE else np.linalg.norm(self.half))


@dataclass
class Scene:
    """A scene. It has a directional light of constant intensity, so that colours do not depend on depth."""

    solids: list[Solid]  # the room first
    focal: float  # focal length, in image widths
    light: Array  # (3,): unit vector towards the light
    ambient: float  # share of ambient light
    exposure: Array  # (3,): gain of each colour channel
    noise: float  # standard deviation of the sensor noise


def draw_scene(rng: Generator) -> Scene:
    """Draws a random scene of 3 to 8 objects in a room."""
    focal = rng.uniform(0.9, 1.4)
    room = Solid(BACKGROUND, rng.uniform(-1, 1, 3), rng.uniform(8, 13, 3), _rotation(rng, 0.3), _texture(rng, 3.0))
    objects = [_draw_object(rng, focal) for _ in range(rng.integers(3, 9))]
    light = rng.normal(size=3) - [0, 1, 1.5]  # mostly from above and behind the camera
    return Scene(
        [room, *objects],
        focal,
        light / np.linalg.norm(light),
        ambient=rng.uniform(0.2, 0.6),
        exposure=rng.uniform(0.7, 1.2) * rng.uniform(0.9, 1.1, 3),
        noise=rng.uniform(0, 0.02),
    )


def _draw_object(rng: Generator, focal: float) -> Solid:
    kind = int(rng.integers(SPHERE, PLANE + 1))
    depth = rng.uniform(NEAREST, FARTHEST)
    centre = depth * np.array([*rng.uniform(-0.6, 0.6, 2) / focal, 1.0])
    size = rng.uniform(0.35, 1.2)  # independent of depth
    half = size * (np.ones(3) if kind == SPHERE else rng.uniform(0.4, 1.0, 3))
    if kind == PLANE:
        half[2] = 0
    solid = Solid(kind, centre, half, _rotation(rng, np.pi), _texture(rng, size))
    solid.centre[2] = max(depth, solid.reach + 0.5)  # keeps the camera outside the object
    return solid


def _rotation(rng: Generator, max_angle: float) -> Array:
    """Returns a rotation about a random axis by an angle between ±`max_angle`, by Rodrigues' formula."""
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = rng.uniform(-max_angle, max_angle)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def _texture(rng: Generator, size: float) -> Texture:
    waves = rng.normal(size=(3, 3))
    waves *= rng.uniform(0.8, 2.5) / (size * np.linalg.norm(waves, axis=1, keepdims=True))
    return Texture(rng.uniform(0.05, 1.0, (2, 3)), str(rng.choice(PATTERNS)), waves, rng.uniform(size=3))


def render(scene: Scene, size: int, rng: Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """Returns the colours (3, size, size), depth (size, size) and labels (size, size) of a scene. `rng` draws the
    noise."""
    step = 1 / (scene.focal * size)
    along = (np.arange(size) + 0.5 - size / 2) * step
    rays = np.stack([*np.meshgrid(along, along), np.ones((size, size))])
    colour, depth = np.empty((3, size * size)), np.full(size * size, np.inf)
    labels = np.zeros(size * size, np.int64)
    pixels = np.arange(size * size).reshape(size, size)
    for solid in reversed(scene.solids):  # the room last, since objects hide much of it by then
        rows, columns = (slice(0, size),) * 2
        if solid.kind != BACKGROUND:
            rows, columns = (_extent(solid, axis, step, size) for axis in (1, 0))
        part = pixels[rows, columns].ravel()
        if not len(part):
            continue
        directions = rays[:, rows, columns].reshape(3, -1)
        distance, faces = (_hit_sphere if solid.kind == SPHERE else _hit_box)(solid, directions)
        seen = np.flatnonzero(distance < depth[part])
        part, directions, distance = part[seen], directions[:, seen], distance[seen]
        points = solid.axes.T @ (distance * directions - solid.centre[:, None])
        if faces is None:
            lit = (solid.axes.T @ scene.light) @ points / solid.half[0]
        else:  # a face has one brightness on the side that the ray hits
            sides = (solid.axes.T @ scene.light)[faces[seen]]
            lit = np.where(((solid.axes.T @ directions)[faces[seen], np.arange(len(seen))]) > 0, -sides, sides)
        depth[part], labels[part] = distance, solid.kind
        colour[:, part] = solid.texture(points) * (np.maximum(lit, 0) * (1 - scene.ambient) + scene.ambient)
    colour *= scene.exposure[:, None]
    colour += scene.noise * rng.standard_normal(colour.shape, np.float32)
    shape = (size, size)
    return (
        (255 * colour.clip(0, 1)).astype(np.uint8).reshape(3, *shape),
        depth.astype(np.float32).reshape(shape),
        labels.reshape(shape),
    )


def _extent(solid: Solid, axis: int, step: float, size: int) -> slice:
    """Returns a range of pixels along x (0) or y (1) that contains the projection of the solid's bounding cube."""
    near, far = solid.centre[2] - solid.reach, solid.centre[2] + solid.reach
    low, high = solid.centre[axis] - solid.reach, solid.centre[axis] + solid.reach
    first, last = low / (near if low < 0 else far), high / (near if high > 0 else far)
    start, stop = np.clip([np.floor(first / step + size / 2), np.ceil(last / step + size / 2)], 0, size).astype(int)
    return slice(start, stop)


def _hit_sphere(sphere: Solid, rays: Array) -> tuple[Array, None]:
    """Returns the ray parameter (P,) of the first hit of each ray (3, P), infinite without one, and None, since a
    sphere has no faces."""
    square = (rays * rays).sum(0)
    nearest = (sphere.centre @ rays) / square
    beside = nearest * rays - sphere.centre[:, None]  # from the centre to the ray's closest point
    inside = sphere.half[0] ** 2 - (beside * beside).sum(0)
    return np.where(inside > 0, nearest - np.sqrt(np.maximum(inside, 0) / square), np.inf), None


def _hit_box(box: Solid, rays: Array) -> tuple[Array, NDArray[np.int64]]:
    """Returns the ray parameter (P,) of the first hit of each ray (3, P), infinite without one, and the axis (P,) of
    the face that was hit. Rays start outside a box, and inside the room."""
    inverse = 1 / (box.axes.T @ rays)
    middle, reach = (box.axes.T @ box.centre)[:, None] * inverse, box.half[:, None] * np.abs(inverse)
    if box.kind == BACKGROUND:
        leave = middle + reach
        return leave.min(0), leave.argmin(0)
    enter = middle - reach
    distance = enter.max(0)
    hit = (distance <= (middle + reach).min(0)) & (distance > 0)
    return np.where(hit, distance, np.inf), enter.argmax(0)
