// SPDX-License-Identifier: MIT
//
// Mixed: the sum of the scores of transition and similar.

#include "prefetch/predictors/predictor.hpp"

namespace rotary {

namespace {

class mixed : public scoring_predictor {
  public:
    explicit mixed(const predictor_setting & setting) :
        scoring_predictor(setting.n_expert), transition_(transition_new(setting)), similar_(similar_new(setting)) {}

    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) override {
        n_used_ = n_used;
        transition_->note(layer, ids, n_used, n_tokens);
        similar_->note(layer, ids, n_used, n_tokens);
    }

    void learn(int32_t layer, const float * popularity, const float * pairs, const float * popularity_before,
               int64_t n_tokens) override {
        transition_->learn(layer, popularity, pairs, popularity_before, n_tokens);
    }

    bool score(int32_t layer, int32_t ahead, std::vector<double> & score) override {
        similar_->score(layer, ahead, score);
        pairs_.assign(n_expert_, 0);
        transition_->score(layer, ahead, pairs_);
        double sum = 1e-9;
        for (const double each : pairs_) {
            sum += each;
        }
        for (int32_t expert = 0; expert < n_expert_; expert++) {
            score[expert] += pairs_[expert] / sum * n_used_;
        }
        return true;
    }

  private:
    int32_t                            n_used_ = 0;
    std::vector<double>                pairs_; // [n_expert]
    std::unique_ptr<scoring_predictor> transition_, similar_;
};

} // namespace

std::unique_ptr<predictor> mixed_new(const predictor_setting & setting) {
    return std::make_unique<mixed>(setting);
}

} // namespace rotary
