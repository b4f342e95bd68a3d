--- @include lib/basics/time

-- An ended request that is to run again loses the TTL of its end. Its outputs, history and results get the day that
-- those of any living request have: if RQ's tools delete its job, they do not stay for ever.
local function live_again(id)
  redis.call('PERSIST', KEY.job .. id)
  for _, name in ipairs({ KEY.output, KEY.history, KEY.results }) do redis.call('EXPIRE', name .. id, DAY) end
end
