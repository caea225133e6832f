// The plugin's rules for step.cpp, which includes this file after what rules are made of.
//
// A rule is a struct with STATES, Scalars and update(): u and the new states from the gradient and
// the states.  NAMEScalars and NAME_FLAG(variant) are declared from the rule's KernelForm
// (megatron_s3/rules); rule_NAME(variant) says what steps a chunk.

namespace {

// ---- rules, megatron_s3/rules: u and the new states from gradient and states ---------------------

// m = state[0], r = state[1]. grad_bound is 0 where there is none.
template <int P, bool NESTEROV, bool CAUTIOUS>
struct S3 {
  static constexpr int STATES = 2;
  using Scalars = S3Scalars;

  INLINE void update(Floats& u, Floats (&state)[2], const Floats& gradient, const Scalars& s) {
    Floats &m = state[0], &r = state[1];
    Int g_bits[LANES], r_bits[LANES], exponent[LANES], untouched[LANES];
    Floats g, inverse, scale, share, d, w, y;

    EACH g[k] = gradient[k];
    if (s.grad_bound != 0) {
      EACH y[k] = s.grad_bound * r[k];
      EACH y[k] = r[k] < 0x1p-126f ? Float{} + __builtin_inff() : y[k];
      EACH g[k] = g[k] > y[k] ? y[k] : g[k];
      EACH g[k] = g[k] < -y[k] ? -y[k] : g[k];
    }
    // Not r == 0 for untouched: see the rule.
    if (s.beta_s == 0) EACH r[k] = Float{};
    EACH g_bits[k] = (Int)g[k] & 0x7fffffff;
    EACH r_bits[k] = (Int)r[k] & 0x7fffffff;
    EACH exponent[k] = (r_bits[k] > g_bits[k] ? r_bits[k] : g_bits[k]) & 0x7f800000;
    EACH untouched[k] = (exponent[k] | g_bits[k]) == 0;
    EACH exponent[k] = exponent[k] > 0x00800000 ? exponent[k] : Int{} + 0x00800000;
    EACH inverse[k] = (Float)(0x7f800000 - exponent[k]);
    EACH scale[k] = (Float)exponent[k] * 0.5f;

    EACH d[k] = (Float)g_bits[k] * inverse[k];
    EACH w[k] = r[k] * inverse[k];
    power<P>(d);
    power<P>(w);
    EACH d[k] = s.one_minus_beta_s * d[k];
    EACH w[k] = s.beta_s * w[k] + d[k];

    EACH share[k] = s.one_minus_beta * g[k];
    EACH m[k] = s.beta * m[k] + share[k];
    EACH u[k] = NESTEROV ? s.beta * m[k] + share[k] : m[k];
    EACH u[k] = u[k] * inverse[k];
    // Zeroed here, what they are multiplied with is finite and positive.
    EACH u[k] = untouched[k] ? Float{} : u[k];
    EACH scale[k] = untouched[k] ? Float{} : scale[k];

    if (P == 3) {
      inverse_cube_root(y, w);
      EACH r[k] = w[k] * y[k];
      EACH r[k] = r[k] * y[k];
    } else {
      EACH y[k] = r[k] = P == 2 ? root(w[k]) : w[k];
    }
    EACH r[k] = scale[k] * r[k];
    if (NESTEROV) {
      EACH w[k] = s.beta_s * w[k] + d[k];
      if (P == 3) {
        inverse_cube_root(y, w);
      } else {
        EACH y[k] = P == 2 ? root(w[k]) : w[k];
      }
    }
    if (P == 3) {
      EACH u[k] = u[k] * y[k];
    } else {
      // 0 / 0 where untouched
      EACH u[k] = u[k] / (untouched[k] ? Float{} + 1.0f : y[k]);
    }
    if (s.correction != 1) EACH u[k] = s.correction * u[k];
    if (CAUTIOUS) {
      EACH untouched[k] = ((u[k] > 0) & (g[k] <= 0)) | ((u[k] < 0) & (g[k] >= 0));
      EACH u[k] = untouched[k] ? Float{} : u[k];
    }
    EACH u[k] = at_most(u[k], Float{} + s.bound);
    EACH u[k] = at_least(u[k], Float{} - s.bound);
  }
};

// The averages of Adam's family: m = state[0], v = state[1].
template <class Scalars>
INLINE void adam_averages(Floats (&state)[2], const Floats& g, const Scalars& s) {
  Floats square;
  EACH square[k] = g[k] * g[k];
  average(state[0], s.beta1, s.one_minus_beta1, g);
  average(state[1], s.beta2, s.one_minus_beta2, square);
}

struct AdamW {
  static constexpr int STATES = 2;
  using Scalars = AdamwScalars;  // bound: inf where there is none

  INLINE void update(Floats& u, Floats (&state)[2], const Floats& g, const Scalars& s) {
    Floats denominator;
    adam_averages(state, g, s);
    EACH denominator[k] = root(state[1][k]) * s.root_factor + s.eps;
    EACH u[k] = state[0][k] * s.factor / denominator[k];
    EACH u[k] = at_most(u[k], Float{} + s.bound);
    EACH u[k] = at_least(u[k], Float{} - s.bound);
  }
};

struct NAdam {
  static constexpr int STATES = 2;
  using Scalars = NadamScalars;

  INLINE void update(Floats& u, Floats (&state)[2], const Floats& g, const Scalars& s) {
    Floats denominator;
    adam_averages(state, g, s);
    EACH denominator[k] = root(state[1][k] * s.factor) + s.eps;
    EACH u[k] = g[k] * s.weight_grad + state[0][k] * s.weight_avg;
    EACH u[k] = u[k] / denominator[k];
  }
};

// m, v, n, the gradient of the step before. first: 1 in the first step, which has none, and else 0.
struct Adan {
  static constexpr int STATES = 4;
  using Scalars = AdanScalars;

  INLINE void update(Floats& u, Floats (&state)[4], const Floats& g, const Scalars& s) {
    Floats &m = state[0], &v = state[1], &n = state[2], &previous = state[3];
    Floats d, denominator;
    EACH d[k] = g[k] - (s.first != 0 ? g[k] : previous[k]);
    EACH previous[k] = g[k];
    average(m, s.beta1, s.one_minus_beta1, g);
    average(v, s.beta2, s.one_minus_beta2, d);
    EACH d[k] = d[k] * s.beta2 + g[k];
    EACH d[k] = d[k] * d[k];
    average(n, s.beta3, s.one_minus_beta3, d);
    EACH denominator[k] = root(n[k]) * s.root_factor + s.eps;
    EACH u[k] = m[k] * s.factor + v[k] * s.weight_diff;
    EACH u[k] = u[k] / denominator[k];
  }
};

struct Lion {
  static constexpr int STATES = 1;
  using Scalars = LionScalars;

  INLINE void update(Floats& u, Floats (&state)[1], const Floats& g, const Scalars& s) {
    EACH u[k] = state[0][k];
    average(u, s.beta1, s.one_minus_beta1, g);
    EACH u[k] = sign(u[k]);
    average(state[0], s.beta2, s.one_minus_beta2, g);
  }
};

template <bool NESTEROV>
struct Sgdm {
  static constexpr int STATES = 1;
  using Scalars = SgdmScalars;

  INLINE void update(Floats& u, Floats (&state)[1], const Floats& g, const Scalars& s) {
    Floats& v = state[0];
    EACH v[k] = v[k] * s.momentum + g[k];
    EACH u[k] = NESTEROV ? v[k] * s.momentum + g[k] : v[k];
  }
};

struct Signsgd {
  static constexpr int STATES = 1;
  using Scalars = SignsgdScalars;

  INLINE void update(Floats& u, Floats (&state)[1], const Floats& g, const Scalars& s) {
    average(state[0], s.momentum, s.one_minus_momentum, g);
    EACH u[k] = sign(state[0][k]);
  }
};

}  // namespace

extern "C" {

// What `step` is given of each rule in each of its variants.

Chunk rule_s3(int64_t variant) {
  static const Chunk chunks[3][2][2] = {
      {{chunk<S3<1, false, false>>, chunk<S3<1, false, true>>},
       {chunk<S3<1, true, false>>, chunk<S3<1, true, true>>}},
      {{chunk<S3<2, false, false>>, chunk<S3<2, false, true>>},
       {chunk<S3<2, true, false>>, chunk<S3<2, true, true>>}},
      {{chunk<S3<3, false, false>>, chunk<S3<3, false, true>>},
       {chunk<S3<3, true, false>>, chunk<S3<3, true, true>>}},
  };
  // That nothing is kept of s (s3_forgets) is seen where it matters, as is a bound (s3_bounded).
  return chunks[s3_whole_p(variant) - 1][s3_nesterov(variant)][s3_cautious(variant)];
}
Chunk rule_adamw(int64_t) { return chunk<AdamW>; }
Chunk rule_nadam(int64_t) { return chunk<NAdam>; }
Chunk rule_adan(int64_t) { return chunk<Adan>; }
Chunk rule_lion(int64_t) { return chunk<Lion>; }
Chunk rule_sgdm(int64_t variant) { return sgdm_nesterov(variant) ? chunk<Sgdm<true>> : chunk<Sgdm<false>>; }
Chunk rule_signsgd(int64_t) { return chunk<Signsgd>; }

}
