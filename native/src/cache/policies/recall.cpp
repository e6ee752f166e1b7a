// SPDX-License-Identifier: MIT
//
// Recall: tokens that were routed alike are followed by tokens that are routed alike. The last token's routing is
// compared with that of each token in a window before it; the experts of tokens that followed similar ones will
// probably be wanted next. Where no token is similar, this is lfu.
//
// Similarity is the number of experts that two tokens share, summed over all layers, and kept by the distance between
// them. When a layer notes a token, only its part of the sums changes; later layers still count the token before.

#include "cache/policies/policy.hpp"

#include <algorithm>
#include <deque>

namespace rotary {

static constexpr int32_t window = 192; // tokens before the last one

// Routing of the last tokens, shared by all layers of a model.
class routing_history {
  public:
    explicit routing_history(int32_t n_layers) : part_(n_layers, std::vector<int32_t>(window, 0)), sum_(window, 0) {}

    // `shared`: how many experts of `layer` the last token shares with the token at each distance; 0: the one before.
    void record(int32_t layer, const std::vector<int32_t> & shared) {
        std::vector<int32_t> & part = part_[layer];
        for (int32_t i = 0; i < window; i++) {
            sum_[i] += shared[i] - part[i];
            part[i] = shared[i];
        }
    }
    int32_t sum(int32_t distance) const { return sum_[distance]; }

  private:
    std::vector<std::vector<int32_t>> part_; // [n_layers][window]
    std::vector<int32_t>              sum_;  // [window]
};

namespace {

class recall : public policy {
  public:
    recall(const policy_setting & setting) :
        layer_(setting.layer), history_(setting.history), frequency_(setting.n_expert, 0), score_(setting.n_expert, 0),
        noted_in_(setting.n_expert, -1), shared_(window, 0) {}

    void note(const int32_t * ids, const float *, int32_t n_used, int32_t n_tokens) override {
        for (int32_t t = 0; t < n_tokens; t++) {
            tokens_.emplace_back(ids + t * n_used, ids + (t + 1) * n_used);
            for (double & each : frequency_) {
                each *= keep;
            }
            for (const int32_t expert : tokens_.back()) {
                frequency_[expert] += 1 - keep;
            }
        }
        while (tokens_.size() > window + 1) {
            tokens_.pop_front();
        }
        n_noted_++;
        for (const int32_t expert : tokens_.back()) {
            noted_in_[expert] = n_noted_;
        }
        for (int32_t i = 0; i + 1 < (int32_t) tokens_.size(); i++) {
            const std::vector<int32_t> & before = tokens_[tokens_.size() - 2 - i];
            shared_[i] = (int32_t) std::count_if(before.begin(), before.end(),
                                                 [&](int32_t expert) { return noted_in_[expert] == n_noted_; });
        }
        history_->record(layer_, shared_);
        scored_ = false;
    }

    int32_t choose(const std::vector<int32_t> & candidates) override {
        if (!scored_) {
            score();
        }
        return *std::min_element(candidates.begin(), candidates.end(),
                                 [&](int32_t a, int32_t b) { return score_[a] < score_[b]; });
    }

  private:
    static constexpr double keep = 0.95, wave_decay = 0.8; // decay per token: of frequency_, and of `wave` in score()

    // Experts of tokens that followed a similar one gain by the fourth power of the similarity.
    void score() {
        const int32_t n    = (int32_t) tokens_.size();
        const auto    all  = (double) tokens_.back().size();
        double        sum  = 1e-9;
        double        wave = 0; // what the tokens before tokens_[i] predict for it
        score_.assign(score_.size(), 0);
        for (int32_t i = 0; i < n; i++) {
            for (const int32_t expert : tokens_[i]) {
                score_[expert] += wave;
            }
            const double alike  = i + 1 < n ? history_->sum(n - 2 - i) / all : 0;
            const double weight = alike * alike * alike * alike;
            wave                = wave * wave_decay + weight;
            sum += weight;
        }
        for (size_t expert = 0; expert < score_.size(); expert++) {
            score_[expert] = score_[expert] / sum + frequency_[expert];
        }
        scored_ = true;
    }

    int32_t                          layer_;
    std::shared_ptr<routing_history> history_;
    std::deque<std::vector<int32_t>> tokens_;            // the experts of each token of the window, and of the last
    std::vector<double>              frequency_, score_; // [n_expert]
    std::vector<int64_t>             noted_in_;          // [n_expert] the last note() that named it
    std::vector<int32_t>             shared_;            // [window]
    int64_t                          n_noted_ = 0;
    bool                             scored_  = false;
};

} // namespace

std::unique_ptr<policy> recall_new(const policy_setting & setting) {
    return std::make_unique<recall>(setting);
}

std::shared_ptr<routing_history> routing_history_new(int32_t n_layers) {
    return std::make_shared<routing_history>(n_layers);
}

} // namespace rotary
